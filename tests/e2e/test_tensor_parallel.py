"""Weights split over two processes by Transformers (``tp_plan="auto"``): each rank's heads on any kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tensor_parallel_jobs as jobs
from tests.distributed import run
from tests.forked import FORKED
from tests.sampling import part_of

pytestmark = FORKED

pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    ("family", "unpad"),
    part_of([("llama", False), ("llama", True), ("gemma2", False)], kept=[("llama", True), ("gemma2", False)]),
)
def test_split_weights_keep_documents_apart_and_their_gradients(family: str, unpad: bool, tmp_path: Path) -> None:
    for found in run(2, jobs.packed_and_padded, family, str(tmp_path), unpad):
        assert found["sharded"] == 16  # of 32
        assert found["packed"] < 1e-5
        assert found["padded"] < 1e-5
        assert found["gradients"] < 1e-4


def test_s2_refuses_a_share_of_its_heads(tmp_path: Path) -> None:
    for said in run(2, jobs.halves_of_heads, str(tmp_path)):
        assert "this rank has 2 of the 4 heads (tensor parallelism)" in said
