"""Statistics of packed documents: each document's are its own."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from axattn.kernels.document_statistics import Documents

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6), st.integers(0, 99))
def test_statistics_equal_those_of_each_document_alone(lengths: list[int], seed: int) -> None:
    x = torch.randn(sum(lengths), 3, 4, generator=torch.Generator().manual_seed(seed))
    found = Documents(lengths, CPU)
    parts = x.split(lengths)
    assert torch.allclose(found.mean(x), torch.stack([part.mean(0) for part in parts]), atol=1e-5)
    spread = found.spread(torch.arange(len(lengths)))
    assert spread.tolist() == [number for number, length in enumerate(lengths) for _ in range(length)]


@given(st.lists(st.one_of(st.integers(1, 700), st.sampled_from([8192, 8193, 20000])), max_size=6))
def test_chunks_cover_each_document_and_depend_on_nothing_beside_it(lengths: list[int]) -> None:
    table = Documents(lengths, CPU).chunks
    assert table.shape[1] == 5
    edges = [0, *itertools.accumulate(lengths)]
    for number, length in enumerate(lengths):
        own = table[table[:, 0] == number]
        alone = Documents((length,), CPU).chunks
        assert torch.equal(own[:, 1:3] - edges[number], alone[:, 1:3])
        assert own[0, 1] == edges[number]
        assert own[-1, 2] == edges[number + 1]
        assert torch.equal(own[1:, 1], own[:-1, 2])
        assert len(own) <= 64
        assert own[:, 3].unique().tolist() == [(table[:, 0] < number).sum().item()]
        assert torch.equal(own[:, 4] - own[:, 3], torch.full((len(own),), len(own)))


def test_what_is_infinite_in_one_document_stays_there() -> None:
    x = torch.ones(10, 1, 2)
    x[2] = float("inf")
    x[5] = float("nan")
    found = Documents((4, 3, 3), CPU)
    assert torch.isfinite(found.mean(x)[2]).all()
    assert torch.isinf(found.mean(x)[0]).all()
    assert torch.isnan(found.mean(x)[1]).all()


def test_sixteen_bit_input_is_summed_in_float32() -> None:
    x = torch.full((3000, 1, 1), 1.0, dtype=torch.bfloat16)
    assert Documents((3000,), CPU).mean(x).item() == 1.0  # a sum in bf16 stops at 256
