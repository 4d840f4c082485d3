from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import axattn
from axattn.documents.boundaries import from_cu_seqlens, from_positions
from axattn.documents.collator import PackingCollator
from axattn.documents.examples import IGNORE_INDEX
from axattn.documents.packed_rows import first_fit_decreasing
from axattn.errors import InvalidInputError


def examples(*lengths: int) -> list[dict[str, Any]]:
    """Documents whose tokens are all different: (document number + 1) * 1000 + position."""
    return [{"input_ids": [(i + 1) * 1000 + j for j in range(n)]} for i, n in enumerate(lengths)]


lengths_of = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths_of, st.integers(30, 60))
def test_first_fit_decreasing_packs_everything_once_and_within_the_capacity(lengths: list[int], capacity: int) -> None:
    rows = first_fit_decreasing(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= capacity for row in rows)
    half_full = [row for row in rows if 2 * sum(lengths[i] for i in row) <= capacity]
    assert len(half_full) <= 1  # two rows at most half full would have been one


@given(lengths_of, st.one_of(st.none(), st.integers(2, 40)), st.booleans())
def test_no_token_is_lost_and_documents_are_described_three_ways_alike(
    lengths: list[int], limit: int | None, fixed: bool
) -> None:
    collator = PackingCollator(limit, pad_token_id=7, pad_rows=fixed and limit is not None)
    batch = collator(examples(*lengths))
    rows, size = batch["input_ids"].shape
    assert limit is None or size <= limit
    assert (size == limit) or not (fixed and limit is not None)
    tokens = batch["input_ids"][batch["input_ids"] >= 1000].tolist()
    assert sorted(tokens) == sorted(t for e in examples(*lengths) for t in e["input_ids"])
    assert collator.stats.tokens == sum(lengths)
    assert collator.stats.documents == len(lengths)
    assert collator.stats.tokens + collator.stats.padding == batch["input_ids"].numel()
    assert collator.stats.rows == rows
    by_lengths = from_cu_seqlens(batch["cu_seq_lens_q"], rows, size)
    by_positions = from_positions(batch["position_ids"], None, rows, size)
    assert by_lengths.boundaries == (by_positions.boundaries if by_positions else ((0, size),) * rows)
    assert torch.equal(by_lengths.positions, batch["position_ids"])
    assert batch["max_length_q"] == batch["max_length_k"] == int(batch["cu_seq_lens_q"].diff().max())
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert "attention_mask" not in batch


@given(lengths_of, st.one_of(st.none(), st.integers(2, 40)))
def test_no_loss_crosses_a_boundary_and_every_other_token_is_a_target(lengths: list[int], limit: int | None) -> None:
    batch = PackingCollator(limit)(examples(*lengths))
    ids, labels = batch["input_ids"], batch["labels"]
    first, padding = batch["position_ids"] == 0, ids < 1000
    assert (labels[first] == IGNORE_INDEX).all()
    assert (labels[padding] == IGNORE_INDEX).all()
    rest = ~first & ~padding
    assert torch.equal(labels[rest], ids[rest])
    documents = ids // 1000  # each target follows a token of its own document
    targets = (labels[:, 1:] != IGNORE_INDEX).nonzero()
    assert all(documents[r, c] == documents[r, c + 1] for r, c in targets.tolist())


def test_a_long_document_is_split_or_refused_as_asked() -> None:
    collator = PackingCollator(4)
    batch = collator(examples(10))
    assert batch["input_ids"].shape == (3, 4)
    assert collator.stats.splits == 2
    assert batch["position_ids"].max() == 3
    with pytest.raises(InvalidInputError, match="a document has 10 tokens, a row holds 4"):
        PackingCollator(4, too_long="error")(examples(3, 10))


def test_one_row_holds_everything_without_a_limit() -> None:
    assert PackingCollator()(examples(3, 4, 5))["input_ids"].shape == (1, 12)


def test_padding_of_an_example_is_removed() -> None:
    batch = PackingCollator()([{"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}, *examples(2)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1000, 1001]]


def test_examples_that_hold_several_documents_stay_apart() -> None:
    by_positions = {"input_ids": [1, 2, 3, 4, 5], "position_ids": [0, 1, 0, 1, 2]}
    by_lengths = {"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]}
    by_document_ids = {"input_ids": [1, 2, 3, 4, 5], "attention_mask": [1, 1, 2, 2, 2]}
    padded = {"input_ids": [0, 1, 2, 0, 3, 4, 5, 0], "attention_mask": [0, 2, 2, 0, 1, 1, 1, 0]}
    for example in (by_positions, by_lengths, by_document_ids, padded):
        batch = PackingCollator()([example])
        assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
        assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, IGNORE_INDEX, 4, 5]]


def test_given_labels_and_masks_are_kept() -> None:
    batch = PackingCollator()([{"input_ids": [1, 2, 3], "labels": [1, IGNORE_INDEX, 3]}])
    assert batch["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 3]]
    for key in ("completion_mask", "assistant_masks"):
        batch = PackingCollator()([{"input_ids": [1, 2, 3], key: [0, 0, 1]}])
        assert batch["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 3]]
        assert key not in batch


def test_other_token_features_travel_along_and_tensors_are_fine() -> None:
    example = {"input_ids": torch.tensor([1, 2]), "token_type_ids": torch.tensor([1, 1])}
    batch = PackingCollator(4, pad_rows=True)([example])
    assert batch["token_type_ids"].tolist() == [[1, 1, 0, 0]]


def test_lengths_can_be_left_out() -> None:
    batch = PackingCollator(return_lengths=False)(examples(2, 3))
    assert set(batch) == {"input_ids", "position_ids", "labels"}


def test_a_mask_says_what_is_padding_if_asked_for() -> None:
    batch = PackingCollator(5, return_mask=True)(examples(2, 2, 3))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 5, 7, 10]


@torch.no_grad()
def test_with_a_mask_the_loss_that_balances_experts_leaves_padding_out() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    model = axattn.apply(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval(), "auto")
    documents = [{"input_ids": list(range(3, 3 + length))} for length in (9, 5)]
    expected, padded, masked = (
        model(**PackingCollator(None if full else 32, pad_rows=not full, return_mask=mask)(documents), use_cache=False)
        for full, mask in ((True, False), (False, False), (False, True))
    )
    assert torch.allclose(masked.aux_loss, expected.aux_loss, atol=1e-6)
    assert not torch.allclose(padded.aux_loss, expected.aux_loss, atol=1e-3)
    assert torch.allclose(masked.loss, expected.loss, atol=1e-5)


def test_rows_can_be_a_multiple_of_something() -> None:
    assert PackingCollator(pad_to_multiple_of=8)(examples(3, 6))["input_ids"].shape == (1, 16)


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        ([], "the batch is empty"),
        ([{"labels": [1]}], "has no input_ids"),
        ([{"input_ids": []}], "has no tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "has no tokens"),
        ([{"input_ids": [1, 2], "labels": [1]}], "labels has 1 values for 2 tokens"),
        ([{"input_ids": [1, 2], "seq_lengths": [1]}], "add up to 1 for 2 tokens"),
        ([{"input_ids": [[1, 2]]}], "not a flat list"),
        ([{"input_ids": "text"}], "not a flat list"),
        ([{"input_ids": [1], "extra": [1]}, {"input_ids": [1]}], "only some examples of the batch have extra"),
    ],
)
def test_bad_batches_are_one_clear_error(batch: list[Any], part: str) -> None:
    with pytest.raises(InvalidInputError, match=part):
        PackingCollator()(batch)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_length": 1},
        {"max_length": 8, "too_long": "drop"},
        {"pad_rows": True},
        {"max_length": 10, "pad_to_multiple_of": 8},
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"max_length|too_long"):
        PackingCollator(**arguments)


def test_only_torch_tensors_are_made() -> None:
    PackingCollator()(examples(2), return_tensors="pt")
    with pytest.raises(ValueError, match='"pt" tensors only'):
        PackingCollator()(examples(2), return_tensors="np")


def test_positions_start_where_the_model_s_do() -> None:
    batch = PackingCollator(max_length=8, first_position=2)([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 3]]
    with pytest.raises(ValueError, match="first_position=-1"):
        PackingCollator(first_position=-1)


def test_documents_that_begin_alike_share_a_row() -> None:
    """Completions of two prompts, given in turns, and a document of its own; a prompt that does not fit is cut."""
    prompts = [[3 + n] * 20 for n in range(2)]
    given = [prompts[i % 2] + [50 + i] * 4 for i in range(8)] + [list(range(60, 90))]
    features = [{"input_ids": ids} for ids in given]
    batch = PackingCollator(100, group_by_prefix=True)(features)
    begins = [[row[0] for row in ids.view(-1, 24).tolist()] for ids in batch["input_ids"][:2]]
    assert sorted(begins) == [[3] * 4, [4] * 4]
    assert batch["input_ids"].shape == (3, 96)
    plain = PackingCollator(100)(features)
    found, expected = ([i for i in one["input_ids"].flatten().tolist() if i] for one in (batch, plain))
    assert sorted(found) == sorted(expected)
    small = PackingCollator(50, group_by_prefix=True)(features)
    assert small["input_ids"].shape[0] == 5  # two completions a row, and the document of its own
