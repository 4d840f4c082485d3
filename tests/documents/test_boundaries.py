from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axattn.documents import traced
from axattn.documents.boundaries import Segments, from_cu_seqlens, from_positions
from axattn.errors import InvalidInputError
from tests.models import positions

CPU = torch.device("cpu")
documents = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@given(documents)
def test_positions_and_cumulative_lengths_agree(lengths: list[int]) -> None:
    total = sum(lengths)
    expected = tuple(accumulate(lengths, initial=0))
    by_lengths = from_cu_seqlens(int32(*expected), 1, total)
    assert by_lengths.boundaries == (expected,)
    by_positions = from_positions(positions(tuple(lengths)), None, 1, total)
    assert (by_positions.boundaries if by_positions else ((0, total),)) == (expected,)
    assert torch.equal(by_lengths.positions, positions(tuple(lengths)))
    assert torch.equal(by_lengths.cu_seqlens, int32(*expected))
    assert by_lengths.document_ids.diff().sum() == len(lengths) - 1
    assert by_lengths.packed == (len(lengths) > 1)
    assert by_lengths.documents == len(lengths)


def test_many_rows_have_boundaries_of_their_own() -> None:
    found = from_positions(positions((3, 4), (7,)), None, 2, 7)
    assert found == Segments(((0, 3, 7), (0, 7)), CPU)
    assert from_cu_seqlens(int32(0, 3, 7, 14), 2, 7).boundaries == found.boundaries


def test_one_row_of_positions_stands_for_all_rows() -> None:
    found = from_positions(positions((3, 4)), None, 2, 7)
    assert found is not None
    assert found.boundaries == ((0, 3, 7), (0, 3, 7))


def test_padding_starts_no_document() -> None:
    where = torch.tensor([[1, 1, 1, 0, 1, 2], [0, 1, 2, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    assert from_positions(where, mask, 2, 6) is None
    assert from_positions(where, None, 2, 6) is not None


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("document_ids", "boundaries"),
    [
        ([[1, 1, 2, 2, 0, 3], [2, 2, 1, 1, 0, 0]], ((0, 2, 5, 6), (0, 2, 6))),
        ([[2, 2, 0, 1, 1, 0], [1, 2, 0, 1, 0, 2]], ((0, 3, 6), (0, 1, 3, 5, 6))),  # ids fall, and come back
        ([[0, 0, 1, 1, 2, 2], [0, 2, 2, 2, 2, 2]], ((0, 2, 4, 6), (0, 1, 6))),  # padding in front is no document's
        ([[1, 1, 0, 0, 1, 2], [3, 0, 3, 0, 0, 3]], ((0, 5, 6), (0, 6))),  # padding inside of a document
    ],
)
def test_a_mask_of_document_ids_separates_them_wherever_padding_is(
    document_ids: list[list[int]], boundaries: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> None:
    found = from_positions(None, torch.tensor(document_ids, dtype=dtype), 2, 6)
    assert found is not None
    assert found.boundaries == boundaries


@pytest.mark.parametrize("mask_type", [torch.int64, torch.bool, torch.float32, torch.uint8])
@pytest.mark.parametrize("filler", [0, 1, -1, 4, 99])
@pytest.mark.parametrize("counts_padding", [False, True])
def test_non_contiguous_padding_ends_no_document_whatever_its_own_positions_are(
    counts_padding: bool, filler: int, mask_type: torch.dtype
) -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 1, 0, 0]])
    counted = torch.arange(8).expand(2, 8) if counts_padding else mask.cumsum(-1) - 1
    one = counted.masked_fill(mask == 0, filler)
    assert from_positions(one, mask.to(mask_type), 2, 8) is None
    two = torch.where(torch.arange(8) < 5, one, one - one[:, 5:].clamp(min=4).min()).masked_fill(mask == 0, filler)
    found = from_positions(two, mask.to(mask_type), 2, 8)  # positions fall after token 4
    assert found is not None
    assert found.boundaries == ((0, 1, 6, 8), (0, 5, 8))


rows = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6)


@given(rows, st.booleans(), st.integers(-1, 5))
def test_a_graph_reads_the_documents_that_are_read_outside_of_one(
    parts: list[tuple[int, int]], by_document_id: bool, filler: int
) -> None:
    """Runs of document ids, 0 for padding; the oracle walks over the row."""
    given_ids = [number for number, length in parts for _ in range(length)]
    ids, where, last, document = [], [], 0, -1
    for number in given_ids:
        if number and number != last:
            document, last = document + 1, number
            where.append(0)
        else:
            where.append(max([p for p, n in zip(where, ids, strict=True) if n == document], default=-1) + 1)
        ids.append(document if number else None)
    mask, real = torch.tensor([given_ids]), torch.tensor([given_ids]) != 0
    positions = torch.tensor([where]).masked_fill(~real, filler)
    expected = [n for n in ids if n is not None]
    given = (None, mask) if by_document_id else (positions, real.long())
    eager = from_positions(*given, 1, len(given_ids))
    graph = traced.from_positions(*given, 1, len(given_ids))
    if len(set(expected)) < 2:
        assert eager is None
        assert graph is None or not graph.document_ids.any()
        return
    assert eager is not None
    assert graph is not None
    assert torch.equal(graph.document_ids, eager.document_ids)
    found = eager.document_ids[real]
    assert torch.equal(found - found[0], torch.tensor(expected))
    assert (eager.document_ids[0, 0] == found[0]) == bool(given_ids[0]), "padding in front is no part of the first"


def test_plain_rows_have_no_segments() -> None:
    assert from_positions(torch.arange(5)[None], None, 1, 5) is None
    assert from_positions(None, torch.ones(2, 5, dtype=torch.long), 2, 5) is None
    assert from_positions(None, None, 2, 5) is None
    assert from_positions(torch.zeros(2, 1, dtype=torch.long), None, 2, 1) is None


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (int32(0, 3, 6), "ends at 6, but the batch has 1 x 7 = 7 tokens"),
        (int32(0, 5, 3, 7), "decreases from 5 to 3 at index 2"),
        (int32(1, 7), "starts at 1"),
        (torch.tensor([0, 7]), "dtype is int64"),
        (torch.tensor([0.0, 7.0]), "dtype is float32"),
        (int32(7), "shape is \\[1\\]"),
        (int32(0, 7)[None], "shape is \\[1, 2\\]"),
        ([0, 7], "must be an int32 tensor, not list"),
    ],
)
def test_bad_cumulative_lengths_are_refused_by_name(value: torch.Tensor, part: str) -> None:
    with pytest.raises(InvalidInputError, match=part) as caught:
        from_cu_seqlens(value, 1, 7, "cu_seq_lens_k")
    assert "cu_seq_lens_k" in str(caught.value)


def test_every_problem_of_cumulative_lengths_is_reported_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        from_cu_seqlens(torch.tensor([1, 5, 3]), 1, 7)
    assert len(caught.value.reasons) == 4


def test_a_document_that_spans_two_rows_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="spans two rows"):
        from_cu_seqlens(int32(0, 3, 10, 14), 2, 7)
