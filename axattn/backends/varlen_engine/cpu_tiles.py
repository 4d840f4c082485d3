"""Exact attention over a `Layout` on a CPU: torch's own flash kernel, tile by tile, with one autograd node.

A tile is a block of queries with the keys that they attend to, so time and memory follow documents and window, never
S x S. Bitwise equal to ``F.scaled_dot_product_attention`` on each document alone (same kernel, same inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from axattn.documents.boundaries import Ranges, cut, total
from axattn.hf.torch_internals import cpu_flash_backward, cpu_flash_forward
from axattn.masks.dense_rule import dense_rule
from axattn.masks.varlen_layout import Layout, Span

_WINDOW_BLOCK = 256  # minimum queries of a windowed tile: larger tiles mask out more, smaller ones need more calls


class Tile(NamedTuple):
    """Queries ``[q0, q1)`` of rows ``[row0, row1)`` over keys ``[k0, k1)``; `offset` is the first query's key index.
    With a `stem`, the keys are those of its ranges and then ``[k0, k1)``."""

    row0: int
    row1: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    offset: int | None  # None: no mask besides `causal`
    stem: Ranges = ()

    @property
    def keys(self) -> int:
        """The number of keys."""
        return self.k1 - self.k0 + total(self.stem)


class Tiles(NamedTuple):
    """The tiles of a layout. `disjoint`: they cover every query and every key exactly once, so outputs and gradients
    need no zeroing and no adding."""

    tiles: list[Tile]
    disjoint: bool


def cut_tiles(layout: Layout) -> list[Tile]:
    """Cut the spans of a layout into tiles. Without a window a span is one tile; windowed spans are cut in blocks."""
    result: list[Tile] = []
    for span, stem in layout.with_stems:
        row0, row1, q0, q1, k0, k1 = span
        if stem and layout.causal:
            result += _along_stem(span, stem, layout.window)
            continue
        if stem:
            result.append(Tile(*span, causal=False, offset=None, stem=stem))
            continue
        queries, keys, window = q1 - q0, k1 - k0, layout.window
        offset = keys - queries  # bottom-right: the last query sits at the last key
        if window is None or window >= keys:
            if not layout.causal or queries == 1:
                result.append(Tile(*span, causal=False, offset=None))
            elif offset == 0:
                result.append(Tile(*span, causal=True, offset=None))
            else:
                result.append(Tile(*span, causal=False, offset=offset))
            continue
        block = max(window, _WINDOW_BLOCK)
        for start in range(0, queries, block):
            end = min(start + block, queries)
            low = max(start + offset - window + 1, 0)
            high = min(end + offset if layout.causal else end + offset + window - 1, keys)
            result.append(Tile(row0, row1, q0 + start, q0 + end, k0 + low, k0 + high, False, start + offset - low))
    return result


def _along_stem(span: Span, stem: Ranges, window: int | None) -> list[Tile]:
    """The tiles of a span with a stem: blocks of queries, each with the keys up to its last query's own that a window
    leaves (one mask over all keys would compute both halves of the causal square)."""
    row0, row1, q0, q1, k0, k1 = span
    path: Ranges = (*stem, (k0, k1))
    queries, keys = q1 - q0, total(path)
    narrow = window is not None and window < keys
    block = max(cast(int, window), _WINDOW_BLOCK) if narrow else _WINDOW_BLOCK
    result = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        at, high = keys - queries + start, keys - queries + end
        low = max(at - cast(int, window) + 1, 0) if narrow else 0
        *front, (a, b) = cut(path, low, high)
        single = end - start == 1
        result.append(Tile(row0, row1, q0 + start, q0 + end, a, b, False, None if single else at - low, tuple(front)))
    return result


@functools.lru_cache(maxsize=64)
def _tile_mask(
    queries: int, keys: int, offset: int, causal: bool, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Additive ``[queries, keys]`` of one tile (0 or -inf). Cached: inner tiles are alike in every layer."""
    attended = dense_rule(queries, keys, causal=causal, window=window, offset=offset)[0, 0]
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_(~attended, float("-inf"))


class _Segmented(torch.autograd.Function):
    """Forward and backward of torch's CPU flash attention over tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tiles: Tiles,
        layout: Layout,
        scale: float,
    ) -> torch.Tensor:
        out, saved = forward_over_tiles(query, key, value, tiles, layout, scale)
        ctx.save_for_backward(query, key, value, out, *saved)
        ctx.tiles, ctx.layout, ctx.scale = tiles, layout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, *saved = ctx.saved_tensors
        dq, dk, dv = backward_over_tiles(grad, query, key, value, out, saved, ctx.tiles, ctx.layout, ctx.scale)
        return dq, dk, dv, None, None, None


def forward_over_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles, layout: Layout, scale: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`attention_over_tiles` without autograd: ``[B, S, H, D]``, and each tile's logsumexp ``[rows, H, queries]``."""
    B, H, S, _ = query.shape
    out = (query.new_empty if tiles.disjoint else query.new_zeros)(B, S, H, value.shape[-1])
    saved = []
    for tile in tiles.tiles:
        q, k, v = _slices(tile, query, key, value)
        part, lse = cpu_flash_forward(q, k, v, tile.causal, _mask_of(tile, layout, q.dtype), scale)
        out[tile.row0 : tile.row1, tile.q0 : tile.q1] = part.transpose(1, 2)
        saved.append(lse)
    return out, saved


def backward_over_tiles(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexps: Sequence[torch.Tensor],
    tiles: Tiles,
    layout: Layout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_over_tiles`.

    Args:
        grad: gradient of the output, ``[B, S, H, D]``.
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, D]``.
        out: the output, ``[B, S, H, D]``.
        logsumexps: float32 ``[rows, H, queries]`` of each tile.
        tiles: the tiles.
        layout: the layout that they were cut from.
        scale: factor on the logits.
    """
    like = torch.empty_like if tiles.disjoint else torch.zeros_like
    dq, dk, dv = like(query), like(key), like(value)
    for tile, lse in zip(tiles.tiles, logsumexps, strict=True):
        q, k, v = _slices(tile, query, key, value)
        part = (slice(tile.row0, tile.row1), slice(tile.q0, tile.q1))
        mask = _mask_of(tile, layout, q.dtype)
        gq, gk, gv = cpu_flash_backward(
            grad[part].transpose(1, 2), q, k, v, out[part].transpose(1, 2), lse, tile.causal, mask, scale
        )
        if tile.stem:
            rows = slice(tile.row0, tile.row1)
            dq[rows, :, tile.q0 : tile.q1].add_(gq)
            at = 0
            for a, b in (*tile.stem, (tile.k0, tile.k1)):
                dk[rows, :, a:b].add_(gk[:, :, at : at + b - a])
                dv[rows, :, a:b].add_(gv[:, :, at : at + b - a])
                at += b - a
            continue
        for target, part_grad in zip(_slices(tile, dq, dk, dv), (gq, gk, gv), strict=True):
            if tiles.disjoint:
                target.copy_(part_grad)
            else:
                target.add_(part_grad)
    return dq, dk, dv


def _slices(
    tile: Tile, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, keys = slice(tile.row0, tile.row1), slice(tile.k0, tile.k1)
    if tile.stem:
        ranges = (*tile.stem, (tile.k0, tile.k1))
        key, value = (torch.cat([x[rows, :, a:b] for a, b in ranges], 2) for x in (key, value))
        return query[rows, :, tile.q0 : tile.q1], key, value
    return query[rows, :, tile.q0 : tile.q1], key[rows, :, keys], value[rows, :, keys]


def _mask_of(tile: Tile, layout: Layout, dtype: torch.dtype) -> torch.Tensor | None:
    if tile.offset is None:
        return None
    return _tile_mask(tile.q1 - tile.q0, tile.keys, tile.offset, layout.causal, layout.window, dtype)


def attention_over_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
) -> torch.Tensor:
    """Exact attention of a layout.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, D]``.
        layout: spans of the mask.
        scale: factor on the logits.

    Returns:
        ``[B, S, H, D]``; zero at queries that no span covers (padding).
    """
    out: torch.Tensor = _Segmented.apply(query, key, value, tiles_of(layout), layout, scale)  # type: ignore[no-untyped-call]  # torch's apply has no annotations
    return out


def tiles_of(layout: Layout) -> Tiles:
    """The tiles of a layout, cut once for all layers that share it."""

    def cut_once() -> Tiles:
        tiles = cut_tiles(layout)
        return Tiles(tiles, _disjoint(layout, tiles))

    return layout.kept("tiles", cut_once)


def _disjoint(layout: Layout, tiles: list[Tile]) -> bool:
    """See `Tiles`."""
    square = all(t.offset is None and not t.stem and (t.q0, t.q1) == (t.k0, t.k1) for t in tiles)
    square = square and not layout.stems  # the keys of a stem are in several tiles
    covered = sum((t.row1 - t.row0) * (t.q1 - t.q0) for t in tiles)
    return square and layout.q_length == layout.kv_length and covered == layout.rows * layout.q_length
