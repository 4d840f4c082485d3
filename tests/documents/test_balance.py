"""`PackingCollator(balance="flops")`: rows and ranks of equal work, and nothing lost between ranks."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axattn.documents.boundaries import from_cu_seqlens, from_positions
from axattn.documents.collator import PackingCollator
from axattn.documents.examples import IGNORE_INDEX
from axattn.documents.packed_rows import LINEAR_COST, balanced_rows, document_work, first_fit_decreasing
from axattn.errors import InvalidConfigError, InvalidInputError
from benchmarks import balance
from tests.documents.test_collator import examples, lengths_of


def collators(ranks: int, max_length: int | None, **options: Any) -> list[PackingCollator]:
    """One collator per rank."""
    return [PackingCollator(max_length, balance="flops", ranks=ranks, rank=rank, **options) for rank in range(ranks)]


def shares(lengths: list[int], ranks: int, **options: Any) -> list[list[int]]:
    """The ids of the documents of each rank."""
    found = [collator(examples(*lengths))["input_ids"] for collator in collators(ranks, None, **options)]
    return [sorted(set((ids[ids >= 1000] // 1000 - 1).tolist())) for ids in found]


@given(lengths_of, st.one_of(st.none(), st.integers(0, 20)), st.integers(1, 5))
def test_every_item_is_in_one_row_of_one_rank_within_the_capacity(
    lengths: list[int], room: int | None, ranks: int
) -> None:
    capacity = None if room is None else max(lengths) + room
    work = [document_work(length, 20) for length in lengths]
    found = balanced_rows(lengths, work, capacity, ranks)
    assert len(found) == ranks
    rows = list(chain(*found))
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    assert all(rows)
    counts = {len(share) for share in found}
    if capacity is None:
        assert max(counts) == 1
    else:
        assert all(sum(lengths[item] for item in row) <= capacity for row in rows)
        assert len(counts) == 1 or len(rows) == len(lengths)  # a row per item is not enough for all ranks
        assert len(rows) >= min(len(first_fit_decreasing(lengths, capacity)), len(lengths))
    assert found == balanced_rows(lengths, work, capacity, ranks)


@given(lengths_of, st.one_of(st.none(), st.integers(2, 40)), st.integers(1, 4), st.booleans())
def test_the_batches_of_all_ranks_hold_each_token_once(
    lengths: list[int], limit: int | None, ranks: int, fixed: bool
) -> None:
    pad_rows = fixed and limit is not None
    tokens: list[int] = []
    features = examples(*lengths, *[1] * (ranks - len(lengths)))
    for collator in collators(ranks, limit, pad_token_id=7, pad_rows=pad_rows):
        batch = collator(features)
        ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
        rows, size = ids.shape
        assert limit is None or size <= limit
        assert size == limit or not pad_rows
        real = ids >= 1000
        assert real.any(1).all()
        tokens += ids[real].tolist()
        by_lengths = from_cu_seqlens(batch["cu_seq_lens_q"], rows, size)
        by_positions = from_positions(positions, None, rows, size)
        assert by_lengths.boundaries == (by_positions.boundaries if by_positions else ((0, size),) * rows)
        target = real & (positions > 0)
        assert torch.equal(labels[target], ids[target])
        assert (labels[~target] == IGNORE_INDEX).all()
        assert (ids[:, 1:][target[:, 1:]] == ids[:, :-1][target[:, 1:]] + 1).all()
        assert collator.stats.documents == len(features)
        assert (collator.stats.tokens, collator.stats.rows) == (int(real.sum()), rows)
        assert collator.stats.tokens + collator.stats.padding == ids.numel()
    assert sorted(tokens) == sorted(token for feature in features for token in feature["input_ids"])


@given(lengths_of, st.one_of(st.none(), st.integers(2, 40)), st.integers(2, 4))
def test_equal_parts_of_a_batch_without_a_rank_are_those_of_the_ranks(
    lengths: list[int], limit: int | None, ranks: int
) -> None:
    """As accelerate splits a batch with ``dispatch_batches`` and ``split_batches``."""
    operations = pytest.importorskip("accelerate.utils.operations")
    features = examples(*lengths, *[1] * (ranks - len(lengths)))
    whole = PackingCollator(limit, balance="flops", ranks=ranks, return_lengths=False, return_mask=True)(features)
    count = operations.find_batch_size(whole)
    assert count % ranks == 0
    for rank, collator in enumerate(collators(ranks, limit, return_mask=True)):
        part = slice(rank * count // ranks, (rank + 1) * count // ranks)
        mine, own = operations.slice_tensors(whole, part), collator(features)
        rows, size = own["input_ids"].shape
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(mine[key][:rows, :size], own[key])
        assert not mine["attention_mask"][:, size:].any()
        assert not mine["attention_mask"][rows:].any()
        padding = mine["attention_mask"] == 0
        assert (mine["labels"][padding] == IGNORE_INDEX).all()


def test_attention_and_linear_layers_both_count() -> None:
    """One document of 8 tokens has the attention of four of 4, and half their tokens."""
    assert shares([4, 8, 4, 4, 4], 2, linear_cost=0) == [[1], [0, 2, 3, 4]]
    assert shares([4, 8, 4, 4, 4], 2, linear_cost=1000) == [[1, 4], [0, 2, 3]]
    assert document_work(1, 12 * 64) == 12 * 64 + 1
    assert document_work(100, 5) == 100 * 5 + 100**2
    assert document_work(100, 5, 60) == document_work(100, 5) - document_work(60, 5)


def test_what_is_equal_goes_by_its_place_in_the_batch() -> None:
    assert shares([5, 5, 5, 5, 5, 5], 3) == [[0, 3], [1, 4], [2, 5]]
    assert balanced_rows([5] * 8, [1] * 8, 10, 2) == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]


def test_an_item_without_room_starts_another_row() -> None:
    """First-fit decreasing fills two rows of 6, with 3 + 3 and 2 + 2 + 2; equal rows leave no room for the last 2."""
    assert balanced_rows([3, 3, 2, 2, 2], [3, 3, 2, 2, 2], 6) == [[[0, 4], [1], [2, 3]]]
    assert balanced_rows([3, 3, 2, 2, 2], [3, 3, 2, 2, 2], 6, 2) == [[[2, 4], [3]], [[0], [1]]]


def test_a_longer_document_is_cut_and_its_pieces_are_shared_out() -> None:
    parts = [collator(examples(10))["input_ids"] for collator in collators(3, 4, pad_rows=True)]
    assert [ids.tolist() for ids in parts] == [
        [[1000, 1001, 1002, 1003]],
        [[1004, 1005, 1006, 1007]],
        [[1008, 1009, 0, 0]],
    ]


def test_rows_of_one_rank_are_even_too() -> None:
    lengths = [60, 50, 40, 30, 20, 10]
    rows = PackingCollator(100)(examples(*lengths))["input_ids"]
    even = PackingCollator(100, balance="flops")(examples(*lengths))["input_ids"]
    assert [(row >= 1000).sum() for row in rows] == [100, 100, 10]
    assert [(row >= 1000).sum() for row in even] == [70, 70, 70]


@pytest.mark.parametrize(("ranks", "most"), [(2, 1.03), (8, 1.06)])
@pytest.mark.parametrize("max_length", [512, None])
def test_ranks_run_equal_work(ranks: int, most: float, max_length: int | None) -> None:
    """Read off the batches: documents and padding of ``cu_seq_lens``."""

    def imbalance(packers: list[PackingCollator], parts: list[list[dict[str, Any]]]) -> float:
        batches = [packer(part) for packer, part in zip(packers, parts, strict=True)]
        documents = [batch["cu_seq_lens_q"].diff().tolist() for batch in batches]
        work = [sum(document_work(tokens, 12 * 64) for tokens in one) for one in documents]
        return max(work) * ranks / sum(work)

    features = [{"input_ids": [1] * (1 + length // 8)} for length in balance.lengths(48 * ranks, 0)]
    own = [features[at::ranks] for at in range(ranks)]
    separate = imbalance([PackingCollator(max_length) for _ in own], own)
    even = imbalance(collators(ranks, max_length, linear_cost=12 * 64), [features] * ranks)
    assert even < most < separate


def test_the_page_says_what_is_counted() -> None:
    text = balance.PAGE.read_text()
    assert text == balance.page(text), "stale: run python -m benchmarks.balance"
    assert "linear_cost` for a hidden size of 4,096" in text
    assert LINEAR_COST == 12 * 4096


def test_groups_that_begin_alike_stay_together_and_what_they_share_counts_once() -> None:
    prompt = [3] * 40
    group = [prompt + [50 + i] * 4 for i in range(4)]
    others = [[60 + i] * 30 for i in range(4)]
    features = [{"input_ids": ids} for pair in zip(group, others, strict=True) for ids in pair]
    other, one = (
        [document for row in collator(features)["input_ids"].tolist() for document in row if document]
        for collator in collators(2, 210, group_by_prefix=True, linear_cost=1000)
    )
    assert one.count(3) == 160
    assert sorted(one + other) == sorted(token for ids in group + others for token in ids)
    assert {token for token in one if token >= 60} == {62}  # 56 tokens to run and 30, beside 90
    with pytest.raises(InvalidInputError, match="the batch has 1 groups that begin alike for 2 ranks"):
        collators(2, 200, group_by_prefix=True)[0]([{"input_ids": ids} for ids in group])


def test_fewer_documents_than_ranks_are_refused() -> None:
    for collator in collators(3, 8):
        with pytest.raises(InvalidInputError, match=r"the batch has 2 documents for 3 ranks.*drop_last=True"):
            collator(examples(2, 3))
        assert collator(examples(2, 3, 9))["input_ids"].numel()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"balance": "tokens"}, "balance='tokens' is neither"),
        ({"balance": ["flops"]}, "balance="),
        ({"balance": True}, "balance=True"),
        ({"ranks": 2, "rank": 0}, 'ranks=2 does nothing without a balance. Give balance="flops"'),
        ({"balance": "flops", "ranks": 0}, "ranks=0 is not a number of ranks"),
        ({"balance": "flops", "ranks": 2.0}, "ranks=2.0"),
        ({"balance": "flops", "ranks": 4, "rank": 4}, "rank=4 is none of the 4 ranks. Give 0 to 3, or None"),
        ({"balance": "flops", "ranks": 4, "rank": -1}, "rank=-1"),
        ({"balance": "flops", "ranks": 4, "rank": "0"}, "rank='0'"),
        ({"balance": "flops", "ranks": 4}, r"their lengths can't be split. Give a rank, or return_lengths=False"),
        ({"balance": "flops", "linear_cost": -1}, "linear_cost=-1"),
        ({"balance": "flops", "linear_cost": 0.5}, "linear_cost=0.5"),
        ({"balance": "flops", "group_by_prefix": True}, "needs a max_length"),
        (
            {"balance": "flops", "ranks": 2, "return_lengths": False, "pad_token_id": None},
            "pad_token_id=None is no token",
        ),
    ],
)
def test_arguments_that_can_t_be_used_are_one_clear_error(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidConfigError, match=part):
        PackingCollator(**arguments)
