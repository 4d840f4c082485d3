"""`ForwardBackward`: a kernel's forward and backward as two functions that share the output and its logsumexp.

An operator of a compiled graph has no autograd graph between the two. A kernel with a `ForwardBackward` saves those two
tensors, as flash attention does; any other runs its forward again in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from axattn.backends.base import nan_where_not_finite, on_gpu_of
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine.cpu_tiles import backward_over_tiles, forward_over_tiles, tiles_of
from axattn.backends.varlen_engine.flash_backward import Packed, flash_backward
from axattn.backends.varlen_engine.packed import one_head_dim, packed, packed_index, summed, unpacked
from axattn.masks.varlen_layout import Layout

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ForwardBackward(NamedTuple):
    """A kernel's forward and backward.

    Attributes:
        forward: ``(call, layout)`` → output ``[B, S, H, Dv]`` and logsumexp ``[B, H, S]`` (`logsumexp_like`).
        backward: ``(grad [B, S, H, Dv], call, layout, output, logsumexp)`` → gradients to query, key and value.
    """

    forward: Callable[[AttentionCall, Layout], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[[torch.Tensor, AttentionCall, Layout, torch.Tensor, torch.Tensor], Gradients]


def logsumexp_like(query: torch.Tensor) -> torch.Tensor:
    """Zeros ``[B, H, S]`` for queries ``[B, H, S, D]``: float32, or float64 for float64."""
    return query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


# ---- on a CPU: tiles -------------------------------------------------------------------------------------------------


def _tiles_forward(call: AttentionCall, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = one_head_dim(call.query, call.key, call.value)
    tiles = tiles_of(layout)
    out, parts = forward_over_tiles(query, key, value, tiles, layout, call.scale)
    logsumexp = logsumexp_like(query)
    for tile, part in zip(tiles, parts, strict=True):
        logsumexp[tile.row0 : tile.row1, :, tile.q0 : tile.q1] = part
    return nan_where_not_finite(out, query)[..., : call.value.shape[-1]], logsumexp


def _tiles_backward(
    grad: torch.Tensor, call: AttentionCall, layout: Layout, out: torch.Tensor, logsumexp: torch.Tensor
) -> Gradients:
    query, key, value = one_head_dim(call.query, call.key, call.value)
    tiles = tiles_of(layout)
    parts = [logsumexp[tile.row0 : tile.row1, :, tile.q0 : tile.q1] for tile in tiles]
    grad, out = _as_wide(grad, query), _as_wide(out, query)
    return _trimmed(backward_over_tiles(grad, query, key, value, out, parts, tiles, layout, call.scale), call)


TILES = ForwardBackward(_tiles_forward, _tiles_backward)


# ---- on a GPU: packed tokens -----------------------------------------------------------------------------------------


class PackedForwardBackward(NamedTuple):
    """A kernel over packed tokens whose backward is flash attention's.

    Attributes:
        forward: ``(query [tokens, H, D], key, value, packed, layout)`` → output and logsumexp ``[H, tokens]``.
        keys: ``(key [tokens, Hkv, D], layout)`` → the keys of the forward's logits (smoothed, or unchanged).
        recompute: ``(query, key, value, packed)`` → output and logsumexp that backward uses instead, or None.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed, Layout], tuple[torch.Tensor, torch.Tensor]]
    keys: Callable[[torch.Tensor, Layout], torch.Tensor]
    recompute: (
        Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed], tuple[torch.Tensor, torch.Tensor]] | None
    ) = None


def over_packed(kernel: PackedForwardBackward) -> ForwardBackward:
    """The `ForwardBackward` of a kernel over packed tokens."""
    return ForwardBackward(functools.partial(_packed_forward, kernel), functools.partial(_packed_backward, kernel))


def _packed_forward(
    kernel: PackedForwardBackward, call: AttentionCall, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    B, _, S, _ = call.query.shape
    index = packed_index(layout, call.query.device)
    q, k, v, batch = _packed_call(call, layout)
    if index.sequences:
        with on_gpu_of(q):
            out, logsumexp = kernel.forward(q, k, v, batch, layout)
    else:  # no kernel takes zero sequences
        out, logsumexp = q, logsumexp_like(q[None])[0].transpose(0, 1)
    whole = unpacked(out, index.queries, B, S)[..., : call.value.shape[-1]]
    return whole, unpacked(logsumexp.transpose(0, 1), index.queries, B, S).transpose(1, 2)


def _packed_backward(
    kernel: PackedForwardBackward,
    grad: torch.Tensor,
    call: AttentionCall,
    layout: Layout,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> Gradients:
    B, _, S, _ = call.query.shape
    index = packed_index(layout, call.query.device)
    if not index.sequences:
        return torch.zeros_like(call.query), torch.zeros_like(call.key), torch.zeros_like(call.value)
    q, k, v, batch = _packed_call(call, layout)
    wide, out = (packed(_as_wide(x, q).transpose(1, 2), index.queries) for x in (grad, out))
    lse = packed(logsumexp[..., None], index.queries)[..., 0].transpose(0, 1).contiguous()
    with on_gpu_of(q):
        k = kernel.keys(k, layout)
        if kernel.recompute is not None:
            out, lse = kernel.recompute(q, k, v, batch)
        gradients = flash_backward(wide, q, k, v, out, lse, batch)
    dq = unpacked(gradients[0], index.queries, B, S)
    if layout.stems and index.keys is not None:  # the keys of a stem are in several sequences
        dk, dv = (summed(x, index.keys, B, S) for x in gradients[1:])
    else:
        dk, dv = (unpacked(x, index.keys, B, S) for x in gradients[1:])
    return _trimmed((dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)), call)


def _packed_call(call: AttentionCall, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Packed]:
    index = packed_index(layout, call.query.device)
    query, key, value = one_head_dim(call.query, call.key, call.value)
    batch = Packed(*index.lengths, layout.causal, layout.window, call.scale)
    return packed(query, index.queries), packed(key, index.keys), packed(value, index.keys), batch


def _as_wide(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, Dv]`` padded with zeros to the head dim that the kernel ran with."""
    missing = query.shape[-1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _trimmed(gradients: Gradients, call: AttentionCall) -> Gradients:
    dq, dk, dv = gradients
    size = call.query.shape[-1]
    return dq[..., :size], dk[..., :size], dv[..., : call.value.shape[-1]]
