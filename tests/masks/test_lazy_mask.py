from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as mu

from axattn.documents.boundaries import Segments, from_positions
from axattn.errors import UnsupportedAttentionError
from axattn.hf.mask_functions import Pattern, recognise
from axattn.masks import mask_interface
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import lazy_mask
from axattn.masks.varlen_layout import Layout
from tests.models import positions


def hf(**kwargs: Any) -> torch.Tensor:
    return mu.sdpa_mask(**{"allow_is_causal_skip": False, **kwargs})


def functions(window: int, chunk: int, rows: int) -> dict[str, Any]:
    return {
        "causal": mu.causal_mask_function,
        "full": mu.bidirectional_mask_function,
        "window": mu.sliding_window_causal_mask_function(window),
        "window both": mu.sliding_window_bidirectional_mask_function(window),
        "chunk": mu.chunked_causal_mask_function(chunk, torch.zeros(rows, dtype=torch.long)),
        "prefix": mu.or_masks(mu.causal_mask_function, lambda b, h, q, k: (k < 2) & (q >= 0)),
    }


def packed_function(base: Any, where: torch.Tensor, ids: torch.Tensor) -> Any:
    """As Transformers composes it; older versions have no remapping of positions."""
    newer = getattr(mu, "packed_sequence_compatibility_function", None)
    return newer(base, where, ids) if newer else mu.and_masks(base, mu.packed_sequence_mask_function(ids))


KINDS = sorted(functions(1, 1, 1))


def dense_of_layout(layout: Layout) -> torch.Tensor:
    """The mask that a layout means, by its definition."""
    seen = torch.zeros(layout.rows, 1, layout.q_length, layout.kv_length, dtype=torch.bool)
    for row0, row1, q0, q1, k0, k1 in layout.spans:
        offset = (k1 - k0) - (q1 - q0)
        q = torch.arange(q1 - q0)[:, None] + offset
        k = torch.arange(k1 - k0)[None]
        rule = (k <= q) if layout.causal else torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if layout.window is not None:
            rule = rule & (k > q - layout.window)
            if not layout.causal:
                rule = rule & (k < q + layout.window)
        seen[row0:row1, :, q0:q1, k0:k1] = rule
    return seen


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_dense_equals_transformers_and_the_layout_means_the_same(data: st.DataObject, kind: str) -> None:
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    past = data.draw(st.integers(0, 4)) if kind != "full" else 0
    function = functions(data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)), rows)[kind]
    total = length + past
    padding = None
    if data.draw(st.booleans()):
        left = [data.draw(st.integers(0, total - 1)) for _ in range(rows)]
        side = data.draw(st.sampled_from(["left", "right", "holes"]))
        padding = torch.ones(rows, total, dtype=torch.bool)
        for row, n in enumerate(left):
            if side == "holes":
                padding[row, torch.randperm(total)[:n]] = False
            else:
                padding[row, slice(0, n) if side == "left" else slice(total - n, total)] = False
        if kind == "chunk":
            counts = (padding.cumsum(-1) == 0).sum(-1)
            function = mu.chunked_causal_mask_function(3, counts)
    common = {
        "batch_size": rows,
        "q_length": length,
        "kv_length": total,
        "q_offset": past,
        "mask_function": function,
        "attention_mask": padding,
    }
    mask = lazy_mask(**common)
    expected = hf(**common)
    assert torch.equal(mask.dense(), expected)
    layout = mask.layout()
    if layout is not None:
        real = torch.ones(rows, 1, length, 1, dtype=torch.bool)
        if padding is not None and kind not in ("full", "window both"):
            real = padding[:, None, past:, None]
        elif padding is not None:
            real = padding[:, None, :, None]
        # queries that are padding are in no span; what they see does not matter
        assert torch.equal(dense_of_layout(layout) & real, expected & real)
        assert torch.equal(layout.dense(mask.device), dense_of_layout(layout))
    if mask.as_flag is not None:
        rule = expected[0, 0]
        assert (mask.as_flag == "full" and bool(rule.all())) or torch.equal(rule, torch.ones_like(rule).tril())


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(["causal", "full", "window", "window both"]),
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
)
def test_packed_masks_equal_those_of_transformers(data: st.DataObject, kind: str, lengths: list[int]) -> None:
    where, total = positions(tuple(lengths)), sum(lengths)
    base = functions(data.draw(st.integers(1, 5)), 2, 1)[kind]
    found = from_positions(where, None, 1, total)
    assert found is not None
    packed = packed_function(base, where, found.document_ids)
    common = {"batch_size": 1, "q_length": total, "kv_length": total, "mask_function": packed}
    mask = lazy_mask(**common)  # no input hook: the documents are taken from Transformers' own closure
    expected = hf(**common)
    assert torch.equal(mask.dense(), expected)
    layout = mask.layout()
    assert layout is not None
    assert torch.equal(dense_of_layout(layout), expected)


def test_transformers_own_mask_functions_are_recognised() -> None:
    """Drift: runs on the oldest and the newest supported Transformers."""
    known = {kind: recognise(function) for kind, function in functions(3, 4, 1).items()}
    assert known["prefix"] is None
    summary = {k: (p.causal, p.window, p.chunk, p.packed) for k, p in known.items() if p is not None}
    assert summary == {
        "causal": (True, None, None, False),
        "full": (False, None, None, False),
        "window": (True, 3, None, False),
        "window both": (False, 4, None, False),
        "chunk": (True, None, 4, False),
    }
    ids = torch.zeros(1, 4, dtype=torch.long)
    packed = packed_function(mu.sliding_window_causal_mask_function(3), ids, ids)
    pattern = recognise(packed)
    assert pattern is not None
    assert (pattern.packed, pattern.window) == (True, 3)


@pytest.mark.parametrize(
    "function",
    [
        mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: q >= k),
        mu.and_masks(mu.causal_mask_function, mu.sliding_window_overlay(2), mu.causal_mask_function),
        lambda b, h, q, k: q >= k,
        mu.and_masks(mu.sliding_window_overlay(2), mu.bidirectional_mask_function),
        packed_function(lambda *a: a[2] >= a[3], torch.zeros(1, 4), torch.zeros(1, 4)),
    ],
)
def test_anything_unknown_is_not_recognised(function: Any) -> None:
    assert recognise(function) is None


def test_chunks_restart_with_each_document() -> None:
    where = positions((3, 5))
    segments = from_positions(where, None, 1, 8)
    mask = lazy_mask(1, 8, 8, mask_function=mu.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long)))
    packed = mask.with_segments(segments)  # the rule that Transformers gives, documents on top: chunks straddle
    assert packed.layout() is not None
    alone = [
        hf(batch_size=1, q_length=n, kv_length=n, mask_function=mu.chunked_causal_mask_function(2, torch.zeros(1)))
        for n in (3, 5)
    ]
    expected = torch.block_diag(*(m[0, 0].int() for m in alone)).bool()
    assert torch.equal(dense_of_layout(packed.layout())[0, 0], expected)


def test_a_static_cache_offset_is_read_when_the_mask_is_made() -> None:
    offset = torch.tensor(3)
    mask = lazy_mask(1, 2, 8, q_offset=offset)
    offset.add_(2)  # what the cache does in the first layer
    assert torch.equal(mask.dense(), hf(batch_size=1, q_length=2, kv_length=8, q_offset=3))


def make() -> LazyMask:
    return lazy_mask(2, 4, 4, attention_mask=torch.tensor([[True] * 4, [False, True, True, True]]))


@pytest.mark.parametrize(
    "touch",
    [
        lambda m: m[:, :, :, :2],
        lambda m: m & torch.ones(4, 4, dtype=torch.bool),
        lambda m: torch.ones(4, 4, dtype=torch.bool) & m,
        lambda m: ~m,
        lambda m: torch.where(m, 0.0, 1.0),
        lambda m: torch.zeros(2, 1, 4, 4).masked_fill(m, 1.0),
        lambda m: m.to(torch.float32),
        lambda m: m.float() * 2,
        lambda m: m.expand(2, 3, 4, 4),
        lambda m: torch.cat([m, m]),
        lambda m: m + 1,
        lambda m: 1 - m.int(),
        lambda m: torch.nn.functional.pad(m, (0, 1)),
    ],
)
def test_a_touched_mask_is_the_tensor(touch: Any) -> None:
    mask = make()
    found, expected = touch(mask), touch(make().dense())
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)


def test_an_untouched_mask_stays_lazy() -> None:
    mask = make()
    assert mask.shape == (2, 1, 4, 4)
    assert (mask.ndim, mask.dim(), mask.size(-1), len(mask), mask.dtype) == (4, 4, 4, 2, torch.bool)
    assert mask.contiguous() is mask
    assert mask.to("cpu") is mask
    assert mask.to(torch.bool) is mask
    assert mask.to(device=torch.device("cpu"), non_blocking=True) is mask
    assert not hasattr(mask, "__cuda_array_interface__")
    assert mask._dense is None
    assert "LazyMask" in repr(mask)


def test_a_mask_moves_to_another_device_without_becoming_dense() -> None:
    mask = make()
    there = mask.to("meta", non_blocking=True)
    assert isinstance(there, LazyMask)
    assert there.device == torch.device("meta")
    assert mask.to(torch.device("meta")) is there  # for every layer there
    assert (mask._dense, there._dense) == (None, None)
    assert (there.shape, there.pattern, there.q_offset, there.guarded) == (
        mask.shape,
        mask.pattern,
        mask.q_offset,
        mask.guarded,
    )
    assert there.dense().device == torch.device("meta")
    assert isinstance(mask.to("meta", torch.float32), torch.Tensor)


def test_documents_and_padding_move_with_their_mask() -> None:
    real = torch.tensor([[True] * 3 + [False], [True] * 4])
    mask = LazyMask(
        shape=(2, 1, 4, 4),
        pattern=Pattern(causal=True),
        segments=Segments(((0, 2, 4), (0, 4)), torch.device("cpu")),
        padding=real,
        materialise=lambda: real[:, None, None].expand(2, 1, 4, 4),
        device=torch.device("cpu"),
    )
    there = mask.to("meta")
    assert there.segments.boundaries == mask.segments.boundaries
    assert there.segments.document_ids.device == there.padding.device == torch.device("meta")


def test_the_plain_causal_mask_is_one_object_until_it_is_made_dense() -> None:
    def make(rows: int = 2, length: int = 7) -> LazyMask:
        return lazy_mask(rows, length, length, 0, 0, mu.causal_mask_function, None, device="cpu")

    first = make()
    assert make() is first
    assert make(3) is not first
    assert make(2, 8) is not first
    expected = mu.sdpa_mask(2, 7, 7, allow_is_causal_skip=False)
    assert torch.equal(first.dense(), expected)
    assert make() is not first  # it would hold S x S bytes for ever


def test_few_plain_masks_are_kept() -> None:
    for length in range(2, 60):
        lazy_mask(1, length, length, 0, 0, mu.causal_mask_function, None, device="cpu")
    assert len(mask_interface._causal_masks) <= mask_interface._CAUSAL_MASKS_KEPT


def test_slices_that_take_everything_leave_the_mask_lazy() -> None:
    mask = lazy_mask(2, 6, 6, 0, 0, mu.sliding_window_causal_mask_function(3), None, device="cpu")
    assert mask[:, :, :, :] is mask
    assert mask[:, :, slice(0, None), :6] is mask
    assert not mask.materialised
    for index in ((0,), (slice(None),) * 3, (slice(None), slice(None), slice(None), slice(0, 5))):
        assert torch.equal(mask[index], mask.dense()[index])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["causal", "full", "window", "prefix"]), st.integers(1, 5), st.integers(0, 4), st.booleans())
def test_the_last_queries_of_a_mask_are_a_mask(kind: str, start: int, cached: int, padded: bool) -> None:
    rule = functions(3, 4, 2)[kind]
    padding = torch.ones(2, 6 + cached, dtype=torch.bool)
    padding[1, :2] = not padded
    mask = lazy_mask(2, 6, 6 + cached, cached, 0, rule, padding, device="cpu")
    found = mask[:, :, -start:, :]
    assert isinstance(found, LazyMask)
    assert torch.equal(found.dense(), mask.dense()[:, :, -start:])
    layout = found.layout()
    if layout is not None:
        seen = dense_of_layout(layout)
        real = padding[:, None, cached + 6 - start :, None]
        assert torch.equal(seen & real, found.dense() & real)


def test_padding_among_the_keys_says_nothing_of_queries_that_are_other_tokens() -> None:
    """Cross-attention over a padded source, with as many targets as source tokens: no target may be dropped."""
    padding = torch.tensor([[True] * 4 + [False] * 2])
    both = mu.bidirectional_mask_function
    mask = lazy_mask(1, 6, 6, 0, 0, both, padding)  # no input hook: it may be cross-attention
    assert mask.crosses
    assert [tuple(span) for span in mask.layout().spans] == [(0, 1, 0, 6, 0, 4)]
    assert not mask.whole
    mask.crosses = False
    mask._layout = False
    assert [tuple(span) for span in mask.layout().spans] == [(0, 1, 0, 4, 0, 4)]
    assert not lazy_mask(1, 6, 6, 0, 0, mu.causal_mask_function, padding).crosses


def test_a_mask_is_never_added_to_logits() -> None:
    """True and False would count as 1 and 0, and nothing be masked (GIT's layers do it)."""
    mask, logits = lazy_mask(1, 3, 3, 0, 0, mu.causal_mask_function), torch.randn(1, 2, 3, 3)
    for add in (
        lambda: logits + mask,
        lambda: mask + logits,
        lambda: torch.add(logits, mask),
        lambda: logits.clone().add_(mask),
    ):
        with pytest.raises(UnsupportedAttentionError, match="adds its mask to the logits itself"):
            add()
    assert torch.equal((mask + torch.zeros(1, 1, 3, 3, dtype=torch.long)).bool(), mask.dense())


def test_a_mask_compares_by_element_with_numbers_and_tensors_and_else_as_an_object() -> None:
    mask = lazy_mask(1, 3, 3, 0, 0, mu.causal_mask_function)
    assert torch.equal(mask == 0, ~mask.dense())
    assert torch.equal(mask != torch.zeros(3, dtype=torch.bool), mask.dense())
    assert (mask == None) is False  # noqa: E711  # what models write
    assert mask in [mask]
    assert {mask: 1}[mask] == 1
