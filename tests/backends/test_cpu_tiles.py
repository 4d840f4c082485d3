from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from axattn.backends.varlen_engine import cpu_tiles as tiles_module
from axattn.backends.varlen_engine.cpu_tiles import attention_over_tiles, cut_tiles
from axattn.masks.varlen_layout import Layout, Span
from tests.masks.test_lazy_mask import dense_of_layout


def inputs(rows: int, q: int, k: int, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(rows * 1000 + q * 10 + k)
    shapes = ((rows, heads, q, dim), (rows, kv_heads, k, dim), (rows, kv_heads, k, dim))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def compare(layout: Layout) -> None:
    q, k, v = inputs(layout.rows, layout.q_length, layout.kv_length)
    out = attention_over_tiles(q, k, v, layout, 0.3)
    mask = dense_of_layout(layout)
    covered = mask.any(-1)[:, 0, :, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    expected = expected.transpose(1, 2) * covered
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.equal(out * ~covered, torch.zeros_like(out))
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=2),
    window=st.one_of(st.none(), st.integers(1, 12)),
    causal=st.booleans(),
    gap=st.integers(0, 3),
)
def test_tiles_equal_a_dense_mask(lengths: list[list[int]], window: int | None, causal: bool, gap: int) -> None:
    total = max(sum(row) + gap * len(row) for row in lengths)
    spans = []
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            spans.append(Span(row, row + 1, start, start + length, start, start + length))
            start += length + gap
    compare(Layout(tuple(spans), causal, window, len(lengths), total, total))


@pytest.mark.parametrize("window", [None, 3])
def test_queries_over_a_longer_cache_are_aligned_bottom_right(window: int | None) -> None:
    compare(Layout((Span(0, 2, 0, 5, 2, 12),), True, window, 2, 5, 12))


@pytest.mark.parametrize("causal", [True, False])
def test_long_windows_are_cut_in_blocks_and_stay_exact(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "_WINDOW_BLOCK", 16)
    layout = Layout((Span(0, 1, 0, 100, 0, 100),), causal, 7, 1, 100, 100)
    assert len(cut_tiles(layout)) == 7
    compare(layout)


def test_the_work_of_a_window_is_linear_in_the_length() -> None:
    def work(length: int) -> int:
        layout = Layout((Span(0, 1, 0, length, 0, length),), True, 256, 1, length, length)
        return sum((t.q1 - t.q0) * (t.k1 - t.k0) for t in cut_tiles(layout))

    assert work(8192) < 2.2 * work(4096)


def test_each_document_is_bitwise_equal_to_sdpa_on_it_alone() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 300, 32) for _ in range(3))
    spans = (Span(0, 1, 0, 100, 0, 100), Span(0, 1, 100, 300, 100, 300))
    out = attention_over_tiles(q, k, v, Layout(spans, True, None, 1, 300, 300), 32**-0.5)
    for a, b in ((0, 100), (100, 300)):
        alone = F.scaled_dot_product_attention(*(x[:, :, a:b] for x in (q, k, v)), is_causal=True)
        assert torch.equal(out[:, a:b].transpose(1, 2), alone)


def test_tiles_are_cut_once_for_all_layers() -> None:
    layout = Layout((Span(0, 1, 0, 8, 0, 8),), True, 2, 1, 8, 8)
    q, k, v = inputs(1, 8, 8)
    attention_over_tiles(q, k, v, layout, 1.0)
    first = layout.memo["tiles"]
    attention_over_tiles(q, k, v, layout, 1.0)
    assert layout.memo["tiles"] is first
