"""Statistics of packed documents: each document's are its own."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from axattn.backends.documents import Documents

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6), st.integers(0, 99))
def test_statistics_equal_those_of_each_document_alone(lengths: list[int], seed: int) -> None:
    x = torch.randn(sum(lengths), 3, 4, generator=torch.Generator().manual_seed(seed))
    found = Documents(lengths, CPU)
    parts = x.split(lengths)
    assert torch.allclose(found.mean(x), torch.stack([part.mean(0) for part in parts]), atol=1e-5)
    assert torch.equal(found.absmax(x), torch.stack([part.abs().amax((0, 2)) for part in parts]))
    spread = found.spread(torch.arange(len(lengths)))
    assert spread.tolist() == [number for number, length in enumerate(lengths) for _ in range(length)]


def test_what_is_infinite_in_one_document_stays_there() -> None:
    x = torch.ones(10, 1, 2)
    x[2] = float("inf")
    x[5] = float("nan")
    found = Documents((4, 3, 3), CPU)
    assert torch.isfinite(found.mean(x)[2]).all()
    assert torch.isfinite(found.absmax(x)[2]).all()
    assert torch.isinf(found.mean(x)[0]).all()
    assert torch.isnan(found.mean(x)[1]).all()


def test_sixteen_bit_input_is_summed_in_float32() -> None:
    x = torch.full((3000, 1, 1), 1.0, dtype=torch.bfloat16)
    assert Documents((3000,), CPU).mean(x).item() == 1.0  # a sum in bf16 stops at 256
