"""Documents on ranks: nothing lost, equal tokens, equal work."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axattn.documents.boundaries import cut, total
from axattn.documents.placement import EVEN, Document, Placement, place
from tests.parallel.trees import Case, cases


def rows(lengths: list[int]) -> list[Document]:
    """Documents one after the other."""
    edges = [0, *itertools.accumulate(lengths)]
    return [Document(((a, b),)) for a, b in itertools.pairwise(edges)]


def log_normal(tokens: int, mean: int, seed: int) -> list[int]:
    """Lengths of documents that fill a row."""
    import numpy as np

    generator = np.random.default_rng(seed)
    found: list[int] = []
    while sum(found) < tokens:
        found.append(int(min(max(16, generator.lognormal(np.log(mean), 1.0)), tokens)))
    found[-1] -= sum(found) - tokens
    return [length for length in found if length]


@given(cases())
def test_every_token_is_on_one_rank_and_every_piece_knows_its_place(case: Case) -> None:
    placed = place(case.documents, case.tokens, case.ranks, case.multiple)
    held = [placed.held(rank).tolist() for rank in range(case.ranks)]
    assert sorted(itertools.chain(*held)) == list(range(case.tokens))
    assert max(map(len, held)) <= placed.slots
    assert placed.slots % case.multiple == 0
    for rank, tokens in enumerate(held):
        assert tokens == sorted(tokens)
        assert all((placed.owner[t], placed.slot[t]) == (rank, at) for at, t in enumerate(tokens))
    found: dict[int, tuple[int, int]] = {}
    for rank in range(case.ranks):
        for start, end, number, depth in placed.pieces(rank):
            found |= {token: (number, depth + at) for at, token in enumerate(range(start, end))}
            assert set(range(start, end)) <= set(held[rank])
    wanted = {}
    for number, document in enumerate(case.documents):
        own = [token for a, b in document.own for token in range(a, b)]
        wanted |= {token: (number, total(document.stem) + at) for at, token in enumerate(own)}
    assert found == wanted


@pytest.mark.parametrize(("tokens", "mean"), [(131_072, None), (131_072, 8_000), (131_072, 1_000), (16_384, 300)])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_ranks_have_equal_work_and_equal_tokens(tokens: int, mean: int | None, ranks: int) -> None:
    for seed in range(5):
        lengths = [tokens] if mean is None else log_normal(tokens, mean, seed)
        placed = place(rows(lengths), tokens, ranks)
        assert placed.imbalance <= EVEN
        assert placed.slots * ranks <= 1.02 * tokens
        assert sum(placed.work) == sum(length * (length + 1) // 2 for length in lengths)


def test_documents_that_fit_a_rank_stay_whole_and_longer_ones_are_dealt_out_from_both_ends() -> None:
    whole = place(rows([30, 30, 30, 30]), 120, 4)
    assert all(len(ranges) == 1 for ranges in whole.ranges)
    assert place(rows([80]), 80, 2).ranges == (((0, 20), (60, 80)), ((20, 60),))


def test_padding_is_no_work_and_fills_up_what_is_free() -> None:
    placed = place([Document(((0, 10),)), Document(((20, 30),))], 40, 2)
    assert placed.work == [55, 55]
    assert [len(placed.held(rank)) for rank in range(2)] == [20, 20]


def test_the_same_batch_is_placed_in_the_same_way() -> None:
    """Every rank computes it for itself."""
    lengths = [random.Random(3).randint(1, 50) for _ in range(40)]
    first, second = (place(rows(lengths), sum(lengths), 3) for _ in range(2))
    assert (first.ranges, first.slots) == (second.ranges, second.slots)


def test_a_stem_counts_as_work() -> None:
    stem = ((0, 100),)
    alone, after_stem = Document(((100, 110),)), Document(((100, 110),), stem)
    works = [Placement((Document(stem), one), (((0, 110),),), 110, 110).work[0] for one in (alone, after_stem)]
    assert works[1] - works[0] == 10 * 100
    assert cut(stem, 0, 3) == ((0, 3),)


@given(st.integers(1, 5), st.integers(1, 9))
def test_fewer_tokens_than_ranks(tokens: int, ranks: int) -> None:
    placed = place(rows([tokens]), tokens, ranks)
    assert sorted(itertools.chain(*(placed.held(rank).tolist() for rank in range(ranks)))) == list(range(tokens))
