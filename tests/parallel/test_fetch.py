"""Tokens placed on ranks by document, which fetch the keys that they see: outputs and gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from axattn.parallel import fetch_plan as plan
from axattn.parallel import redistribution, split_inputs, travel, whole_batch
from tests import faults
from tests import parallel_jobs as jobs
from tests.distributed import run
from tests.faults import Inject, Patch
from tests.forked import FORKED
from tests.models import CONFIGS
from tests.sampling import part_of

pytestmark = FORKED

CASES = [("llama", "varlen", "varlen", scenario) for scenario in jobs.SCENARIOS]
CASES += [(family, "auto", "", "packed") for family in CONFIGS if family != "llama"]
CASES += [(family, "auto", "", "right padded") for family in ("mistral", "gemma2", "gpt_oss", "llama4", "gemma3")]
HYBRIDS = [
    (family, "auto", "", scenario)
    for family in ("bamba", "qwen3_next", "lfm2", "falcon_h1")
    for scenario in ("packed", "packed uneven", "left padded", "checkpointed", "tiny")
]
FAKES = [
    *[("llama", name, f"[{name}]", "packed") for name in ("sage", "fp8", "xformers")],
    ("llama", "auto", "[flash_attention_3]", "packed uneven"),
    ("mistral", "auto", "[flash_attention_3]", "right padded"),
    ("gpt_oss", "sage", "[sage]", "packed"),
    ("gpt_oss", "auto", "[flash_attention_3]", "packed"),
]
RUNS = [(2, "fetch", 1), (3, "fetch", 3), (4, "both", 5), (4, "both", 1), (8, "fetch", 1), (3, "auto", 1)]


def wrong(found: dict[str, Any], budget: float) -> dict[str, Any]:
    """What is refused or off by more than `budget`; three times that for a token or two (matrices of one row)."""
    most = {key: budget * (3 if key.endswith("tiny") else 1) for key in found}
    return {key: value for key, value in found.items() if isinstance(value, str) or not value < most[key]}


@pytest.mark.parametrize(("world", "strategy", "share"), part_of(RUNS, kept=RUNS[2:3]))
def test_outputs_and_gradients_equal_those_of_one_process(world: int, strategy: str, share: int) -> None:
    for found in run(world, jobs.errors, CASES[::share], strategy):
        assert len(found) == len(CASES[::share])
        assert not wrong(found, 1e-5)


@pytest.mark.parametrize(("world", "share"), part_of([(2, 1), (3, 4), (4, 1), (3, 9)], kept=[(3, 9)]))
def test_documents_are_whole_on_one_rank_for_layers_with_a_state(world: int, share: int) -> None:
    for found in run(world, jobs.errors, HYBRIDS[::share], "fetch"):
        assert len(found) == len(HYBRIDS[::share])
        assert not wrong(found, 1e-4)  # chunked linear attention sums in another order


def test_kernels_of_libraries_attend_to_keys_in_several_ranges() -> None:
    for found in run(2, jobs.errors, FAKES, "fetch"):
        assert not wrong(found, 1e-4)


def test_rows_that_share_a_prompt_run_it_once_over_all_ranks() -> None:
    for found in run(2, jobs.shared_prefixes, ["llama", "gemma3", "gpt_oss", "bamba"]):
        for family, (error, slots, tokens) in found.items():
            assert error < 1e-5, family
            assert slots * 2 < 0.7 * tokens, family


def test_two_strategies_in_one_model_batch_by_batch() -> None:
    """``auto`` exchanges heads for one long document, and fetches keys for short ones."""
    for found in run(2, jobs.strategies):
        assert found == {"one": "split", "packed": "placed", "odd heads": "placed"}


# ---- faults put in on purpose ----------------------------------------------------------------------------------------

PACKED = ("mistral", "auto", "", "uneven")


@faults.fault("rows over ranks: loss, logits or gradients are no longer those of one process")
def keys_of_other_ranks_are_not_fetched(patch: Patch) -> None:
    real = plan.queries_of
    patch.setattr(plan, "queries_of", lambda *args: (one._replace(others=()) for one in real(*args)))


@faults.fault("rows over ranks: loss, logits or gradients are no longer those of one process")
def keys_of_other_ranks_get_no_gradient(patch: Patch) -> None:
    real = redistribution.exchange_rows
    patch.setattr(redistribution, "exchange_rows", lambda x, *args: real(x.detach(), *args))


@faults.fault("rows over ranks: loss, logits or gradients are no longer those of one process")
def a_window_counts_from_the_tokens_of_a_rank(patch: Patch) -> None:
    real = plan.cut
    patch.setattr(plan, "cut", lambda ranges, low, high: real(ranges, low + (low > 0), high))


@faults.fault("rows over ranks: loss, logits or gradients are no longer those of one process")
def targets_are_not_shifted_before_tokens_are_placed(patch: Patch) -> None:
    patch.setattr(split_inputs, "shifted", lambda labels: labels)


@faults.fault("rows over ranks, a layer with a state: loss, logits or gradients are no longer those of one process")
def a_state_starts_anew_on_each_rank(patch: Patch) -> None:
    def apart(placement: Any, paths: Any) -> list[int]:
        return [0] * len(paths)

    real = travel.Segments
    patch.setattr(travel, "_homes", apart)
    patch.setattr(travel, "Segments", lambda boundaries, device: real((tuple(range(boundaries[0][-1] + 1)),), device))


@faults.fault("rows over ranks, shared prefixes: loss, logits or gradients are no longer those of one process")
def hidden_states_come_back_to_another_token(patch: Patch) -> None:
    real = whole_batch.WholeBatch._at_tokens
    patch.setattr(whole_batch.WholeBatch, "_at_tokens", lambda self, source: real(self, source.clip(0) ^ 1))


FAULTY: dict[Inject, tuple[str, str, str, str] | None] = {
    keys_of_other_ranks_are_not_fetched: PACKED,
    keys_of_other_ranks_get_no_gradient: PACKED,
    a_window_counts_from_the_tokens_of_a_rank: PACKED,
    targets_are_not_shifted_before_tokens_are_placed: PACKED,
    a_state_starts_anew_on_each_rank: ("bamba", "auto", "", "uneven"),
    hidden_states_come_back_to_another_token: None,
}


def test_faults_turn_them_red() -> None:
    """Beside the same batches without a fault."""
    names = {inject.__name__.replace("_", " "): case for inject, case in FAULTY.items()}
    for found in run(2, jobs.faulty, names):
        assert found.keys() == {*names, "none"}
        assert found.pop("none") < 1e-5
        assert {name: error for name, error in found.items() if not error > 1e-3} == {}


def test_a_redistribution_sums_the_gradients_of_what_went_to_several_places() -> None:
    import numpy as np

    owner, slot = np.zeros(4, dtype=np.int32), np.arange(4)
    way = redistribution.redistribution([np.array([2, -1, 2, 0])], owner, slot, 0, None, torch.device("cpu"))
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True)
    out = way.run(x)
    assert out[:, 0].tolist() == [3.0, 0.0, 3.0, 1.0]
    (out * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [1000.0, 0.0, 101.0, 0.0]
