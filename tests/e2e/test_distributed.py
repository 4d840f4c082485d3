"""Trainer, DDP and FSDP2 over two processes on gloo: the losses and weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import parallel_jobs as jobs
from tests.distributed import run
from tests.forked import FORKED
from tests.sampling import part_of

pytestmark = FORKED

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Any:
    """A run of one process."""
    return run(1, jobs.trained, str(tmp_path_factory.mktemp("one")), "one", {})[0]


@pytest.mark.parametrize("mode", part_of(["ddp", "balanced", "fsdp", "rows", "heads"], kept=["ddp", "rows"]))
def test_a_trainer_over_two_processes_follows_one(mode: str, alone: Any, tmp_path: Path) -> None:
    """``balanced``: process 0 packs for both, rows of equal work; ``rows`` and ``heads``: rows split over the two,
    through accelerate's ParallelismConfig, and the script has one line more."""
    losses, weights = alone
    for found, mine in run(2, jobs.trained, str(tmp_path), mode, {}):
        assert found == pytest.approx(losses, rel=1e-5)
        assert mine.keys() == weights.keys()
        assert all(torch.allclose(mine[name], weights[name], atol=1e-6) for name in weights)


def test_accumulation_over_split_rows_follows_one_process(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    losses, weights = run(1, jobs.trained, str(tmp_path / "a"), "one", options)[0]
    for found, mine in run(2, jobs.trained, str(tmp_path / "b"), "rows", options):
        assert found == pytest.approx(losses, rel=1e-5)
        assert all(torch.allclose(mine[name], weights[name], atol=1e-6) for name in weights)


def test_a_loss_outside_of_the_model_is_refused_over_split_rows(tmp_path: Path) -> None:
    """It would be as many times too large as there are ranks: 9.14 for 4.57."""
    with pytest.raises(AssertionError, match="would count once per rank"):
        run(2, jobs.trained, str(tmp_path), "rows", {"label_smoothing_factor": 0.1, "max_steps": 1})


def test_noise_that_depends_on_the_length_of_a_row_is_refused_over_split_rows(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="NEFTune scales its noise"):
        run(2, jobs.trained, str(tmp_path), "rows", {"neftune_noise_alpha": 5.0, "max_steps": 1})


@pytest.mark.parametrize("order", part_of(["before", "after"], kept=["after"]))
def test_fsdp_from_the_meta_device_takes_patches_before_and_after_wrapping(order: str) -> None:
    for found in run(2, jobs.from_meta, order):
        assert found["keys"]
        assert found["loss"] < 1e-6
        assert found["gradients"] < 1e-5
        assert found["served"] == {"varlen"}
        assert found["restored"] == "sdpa"
