"""The sampled part of the matrix; ``make conformance`` runs all of it."""

from __future__ import annotations

import os

import pytest
import transformers

from tests.conformance import report
from tests.conformance.cells import OVER_RANKS, every_key, run, sampled
from tests.forked import FORKED
from tests.sampling import OLDEST, SAMPLE

EVERYTHING = os.environ.get("AXATTN_CONFORMANCE") == "all"
KEYS = sorted((key for key in every_key() if EVERYTHING or sampled(key)), key=lambda key: key[1:])
RECORDED = report.load()


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(
            key,
            id="/".join(key),
            marks=FORKED if key[2] == OVER_RANKS else pytest.mark.xdist_group(f"matrix {key[1]}"),
        )
        for key in KEYS
    ],
)
def test_a_cell_is_right_or_refused_with_a_reason(key: tuple[str, str, str]) -> None:
    cell = run(*key)
    assert cell.status != "wrong", cell.detail
    if cell.status == "refused":
        assert cell.detail
    if RECORDED["versions"]["transformers"] == transformers.__version__:
        backend, family, scenario = key
        recorded = report.status(RECORDED["cells"][backend][scenario][family])
        assert cell.status == recorded, f"docs/conformance.json says {recorded}; run `make conformance`"


def test_the_sample_has_every_backend_family_and_scenario() -> None:
    """And beside `auto` every family and scenario on another name; of the oldest it has less."""
    if SAMPLE == "thin" or OLDEST:
        pytest.skip("a thin sample")
    cells = [key for key in every_key() if key[2] != "compiled, fullgraph"]
    assert {key[0] for key in KEYS} == {key[0] for key in cells}
    for part in (1, 2):
        wanted = {key[part] for key in cells}
        assert {key[part] for key in KEYS if key[0] == "auto"} >= wanted
        assert {key[part] for key in KEYS if key[0] != "auto"} >= wanted


def test_auto_is_right_wherever_eager_serves_the_documents_alone() -> None:
    """Refused are only the families with attention code of their own, and what eager itself gets wrong."""
    refused = {
        (family, scenario)
        for scenario, row in RECORDED["cells"]["auto"].items()
        for family, value in row.items()
        if report.status(value) == "refused"
    }
    own_code = {(name, "dense") for name in ("bloom", "falcon", "gpt_neo")}
    # eager drops the gradients of shared keys as well: see
    # `axattn.documents.native_guard.require_gradients_of_shared_keys`
    shared_keys = {("gemma4", "packed gradients, reentrant checkpointing")}
    state = {("qwen3_next", "compiled, fullgraph")}  # lengths of documents are not known while a graph is traced
    # images, and keys selected among the tokens of a row: `axattn.traits.row_forms`
    unshared = {(name, "shared prefixes, gradients") for name in ("gemma3_vl", "qwen2_5_vl", "deepseek_v32")}
    # and outputs that a pooler reads from whole rows, windows to both sides
    whole = {(name, OVER_RANKS) for name in ("gemma3_vl", "qwen2_5_vl", "deepseek_v32", "bert", "modernbert")}
    assert refused == own_code | shared_keys | state | unshared | whole


def test_nothing_in_the_record_is_wrong() -> None:
    assert all(count["wrong"] == 0 for count in report.totals(RECORDED).values())


def test_what_transformers_serves_right_on_eager_or_sdpa_auto_does_not_refuse() -> None:
    cells = RECORDED["cells"]
    for native in ("eager", "sdpa"):
        for scenario, row in cells[native].items():
            for family, value in row.items():
                if report.status(value) == "ok" and family not in ("bloom", "falcon", "gpt_neo"):
                    assert report.status(cells["auto"][scenario][family]) == "ok", (native, scenario, family)
