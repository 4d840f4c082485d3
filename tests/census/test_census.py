"""Every architecture of the installed Transformers: right on axattn backends, or refused with a reason."""

from __future__ import annotations

import zlib

import pytest
import transformers

from tests import distributed
from tests.census import report, split
from tests.census.configs import tiny
from tests.census.examine import every, examine
from tests.forked import FORKED
from tests.sampling import OLDEST, SAMPLE

RECORDS, VERSIONS = report.load()
WHOLE = transformers.__version__ == VERSIONS["transformers"]
"""Whether the record is of this version."""


SHARES = {"test": (32, 32), "thin": (12, 12), "nightly": (2, 4)}
"""One in how many, by `SAMPLE`: of heads that predict tokens, of the others."""


def _sampled(key: tuple[str, str]) -> bool:
    """Always the same part; on the oldest Transformers another one, in ``make test`` the smaller."""
    predict, others = SHARES[SAMPLE]
    share = predict if key[0] in ("causal", "masked", "seq2seq", "vision") else others
    number = zlib.crc32("".join(key).encode())
    return number % 32 == 4 if OLDEST and SAMPLE == "test" else number % share == 0


EVERY = sorted(filter(_sampled, every()))


@pytest.mark.parametrize(("head", "model_type"), EVERY, ids=lambda part: part)
def test_an_architecture_is_right_or_refused(head: str, model_type: str) -> None:
    record = examine(model_type, head)
    wrong = {key: finding.detail for key, finding in record.findings.items() if finding.status == "wrong"}
    assert not wrong
    if not WHOLE:
        return
    recorded = next(one for one in RECORDS if (one.head, one.model_type) == (head, model_type))
    if recorded.skipped:  # an optional library (timm) may be there
        return
    assert not record.skipped
    before = {key: finding.status for key, finding in recorded.findings.items() if key not in split.STRATEGIES}
    assert {key: finding.status for key, finding in record.findings.items()} == before, "stale: run `make census`"


@FORKED
def test_rows_of_decoders_split_over_ranks_are_right_or_refused() -> None:
    """A part of them, always the same; ``make census`` tries all."""
    share, which = (8, 4) if SAMPLE == "nightly" else (260, 65)
    sample = [key for key in split.decoders() if zlib.crc32("".join(key).encode()) % share == which]
    mine, other = distributed.run(2, split.examine, sample)
    assert mine == other
    findings = split.summaries(mine)
    flat = {(*key, tried): found for key, by_way in findings.items() for tried, found in by_way.items()}
    assert {key: found.detail for key, found in flat.items() if found.status == "wrong"} == {}
    for each in () if OLDEST else ("causal", "none"):  # fewer architectures there
        for way in split.STRATEGIES:
            right = [key for key, found in flat.items() if found.status == "ok" and (key[0], key[2]) == (each, way)]
            assert len(right) > 1


def test_the_page_is_made_of_the_record() -> None:
    assert report.PAGE.read_text() == report.render(RECORDS, VERSIONS), "stale: run `make census`"


def test_the_record_reads_back() -> None:
    assert report.read(report.dump(RECORDS, VERSIONS)) == (RECORDS, VERSIONS)
    if WHOLE:
        assert [(record.head, record.model_type) for record in RECORDS] == list(every())


def test_nothing_recorded_is_wrong_and_most_is_right() -> None:
    findings = [finding.status for record in RECORDS for finding in record.findings.values()]
    assert "wrong" not in findings
    assert findings.count("ok") > len(findings) / 2
    assert sum(not record.skipped for record in RECORDS) > 250


def test_a_tiny_config_is_tiny_and_keeps_what_makes_the_family() -> None:
    config = tiny("gemma2")
    assert (config.hidden_size, config.num_hidden_layers, config.attn_logit_softcapping) == (32, 2, 50.0)
    assert set(tiny("gemma3").text_config.layer_types) == {"sliding_attention", "full_attention"}
