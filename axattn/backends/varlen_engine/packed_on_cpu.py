"""Packed attention and its gradient on a CPU, tile by tile: for tests with fakes, and for kernels that run there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from axattn.backends.varlen_engine.cpu_tiles import backward_over_tiles, forward_over_tiles, tiles_of
from axattn.masks.varlen_layout import Layout, Span

if TYPE_CHECKING:
    from axattn.backends.varlen_engine.flash_backward import Packed


def _layout(packed: Packed) -> Layout:
    q, k = packed.cu_q.tolist(), packed.cu_k.tolist()
    spans = tuple(Span(0, 1, *ends) for ends in zip(q, q[1:], k, k[1:], strict=False))
    return Layout(spans, packed.causal, packed.window, 1, q[-1], k[-1])


def _row(x: torch.Tensor) -> torch.Tensor:
    """``[tokens, H, D]`` as one row ``[1, H, tokens, D]``."""
    return x.transpose(0, 1)[None]


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[tokens, H, D]`` and logsumexp ``[H, tokens]`` of exact attention over ``[tokens, H, D]``."""
    layout = _layout(packed)
    tiles = tiles_of(layout)
    out, lses = forward_over_tiles(_row(query), _row(key), _row(value), tiles, layout, packed.scale)
    whole = lses[0].new_empty(query.shape[1], query.shape[0])
    for tile, lse in zip(tiles.tiles, lses, strict=True):
        whole[:, tile.q0 : tile.q1] = lse[0]
    return out[0], whole


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    packed: Packed,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to query, key and value; arguments as those of `flash_backward.flash_backward`."""
    layout = _layout(packed)
    tiles = tiles_of(layout)
    lses = [logsumexp[None, :, tile.q0 : tile.q1] for tile in tiles.tiles]
    grads = backward_over_tiles(
        grad[None], _row(query), _row(key), _row(value), out[None], lses, tiles, layout, packed.scale
    )
    dq, dk, dv = (x[0].transpose(0, 1) for x in grads)
    return dq, dk, dv
