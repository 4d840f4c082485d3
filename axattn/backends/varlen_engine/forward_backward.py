"""`ForwardBackward`: a kernel's forward and backward as two functions that share the output and its logsumexp.

An operator of a compiled graph has no autograd graph between the two. A kernel with a `ForwardBackward` saves those two
tensors, as flash attention does; any other runs its forward again in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from axattn.backends.base import nan_where_not_finite, on_gpu_of
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine.cpu_tiles import backward_over_tiles, forward_over_tiles, tiles_of
from axattn.backends.varlen_engine.flash_backward import Packed, exact_forward, flash_backward
from axattn.backends.varlen_engine.packed import one_head_dim, packed, packed_index, runs_flash, summed, unpacked
from axattn.masks.varlen_layout import Layout

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ForwardBackward(NamedTuple):
    """A kernel's forward and backward.

    Attributes:
        forward: ``(call, layout)`` → output ``[B, S, H, Dv]`` and logsumexp ``[B, H, S]`` (`logsumexp_like`).
        backward: ``(grad [B, S, H, Dv], call, layout, output, logsumexp)`` → gradients to query, key and value.
        key_mean: ``(call, layout)`` → the mean that forward subtracts from the keys of each query, float32
            ``[B, Hkv, S, D]``; None if it subtracts nothing.
        exact: the exact pair whose output and logsumexp `backward` computes again and uses, or None.
    """

    forward: Callable[[AttentionCall, Layout], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[[torch.Tensor, AttentionCall, Layout, torch.Tensor, torch.Tensor], Gradients]
    key_mean: Callable[[AttentionCall, Layout], torch.Tensor] | None = None
    exact: Any = None  # ForwardBackward | None: a NamedTuple can't name itself


def logsumexp_like(query: torch.Tensor) -> torch.Tensor:
    """Zeros ``[B, H, S]`` for queries ``[B, H, S, D]``: float32, or float64 for float64."""
    return query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


# ---- on a CPU: tiles -------------------------------------------------------------------------------------------------


def _tiles_forward(call: AttentionCall, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = one_head_dim(call.query, call.key, call.value)
    tiles = tiles_of(layout)
    out, parts = forward_over_tiles(query, key, value, tiles, layout, call.scale)
    logsumexp = logsumexp_like(query)
    for tile, part in zip(tiles.tiles, parts, strict=True):
        logsumexp[tile.row0 : tile.row1, :, tile.q0 : tile.q1] = part
    return nan_where_not_finite(out, query)[..., : call.value.shape[-1]], logsumexp


def _tiles_backward(
    grad: torch.Tensor, call: AttentionCall, layout: Layout, out: torch.Tensor, logsumexp: torch.Tensor
) -> Gradients:
    query, key, value = one_head_dim(call.query, call.key, call.value)
    tiles = tiles_of(layout)
    parts = [logsumexp[tile.row0 : tile.row1, :, tile.q0 : tile.q1] for tile in tiles.tiles]
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
        key_mean: ``(key [tokens, Hkv, D], layout)`` → what `keys` subtracts, for each query, float32
            ``[query tokens, Hkv, D]``; None if it subtracts nothing.
        backward: ``(grad [tokens, H, D], query, key, value, output, logsumexp, packed, layout)`` → gradients to query,
            key and value; None for torch's own (`flash_backward`).
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed, Layout], tuple[torch.Tensor, torch.Tensor]]
    keys: Callable[[torch.Tensor, Layout], torch.Tensor]
    recompute: (
        Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed], tuple[torch.Tensor, torch.Tensor]] | None
    ) = None
    key_mean: Callable[[torch.Tensor, Layout], torch.Tensor] | None = None
    backward: Callable[..., Gradients] | None = None


def over_packed(kernel: PackedForwardBackward) -> ForwardBackward:
    """The `ForwardBackward` of a kernel over packed tokens."""
    exact, recompute = None, kernel.recompute
    if recompute is not None:
        keys = kernel.keys
        exact = over_packed(
            kernel._replace(forward=lambda q, k, v, p, at: recompute(q, keys(k, at), v, p), recompute=None)
        )
    return ForwardBackward(
        functools.partial(_packed_forward, kernel),
        functools.partial(_packed_backward, kernel),
        None if kernel.key_mean is None else functools.partial(_packed_key_mean, kernel.key_mean),
        exact,
    )


def _packed_key_mean(
    mean: Callable[[torch.Tensor, Layout], torch.Tensor], call: AttentionCall, layout: Layout
) -> torch.Tensor:
    B, _, S, _ = call.query.shape
    index = packed_index(layout, call.query.device)
    if not index.sequences:
        return call.key.new_zeros(B, call.key.shape[1], S, call.key.shape[3], dtype=torch.float32)
    key = packed(one_head_dim(call.query, call.key, call.value)[1], index.keys)
    with on_gpu_of(key):
        found = mean(key, layout)
    return unpacked(found, index.queries, B, S).transpose(1, 2)[..., : call.key.shape[3]]


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
    T = call.key.shape[2]
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
        if kernel.backward is not None:
            gradients = kernel.backward(wide, q, k, v, out, lse, batch, layout)
        else:
            gradients = flash_backward(wide, q, k, v, out, lse, batch)
    dq = unpacked(gradients[0], index.queries, B, S)
    if layout.stems and index.keys is not None:  # the keys of a stem are in several sequences
        dk, dv = (summed(x, index.keys, B, T) for x in gradients[1:])
    else:
        dk, dv = (unpacked(x, index.keys, B, T) for x in gradients[1:])
    return _trimmed((dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)), call)


def _packed_call(call: AttentionCall, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Packed]:
    index = packed_index(layout, call.query.device)
    query, key, value = one_head_dim(call.query, call.key, call.value)
    batch = Packed(*index.lengths, layout.causal, layout.window, call.scale)
    return packed(query, index.queries), packed(key, index.keys), packed(value, index.keys), batch


# ---- torch's own kernels ---------------------------------------------------------------------------------------------

PACKED = over_packed(PackedForwardBackward(lambda q, k, v, batch, _: exact_forward(q, k, v, batch), lambda key, _: key))


def of_torch(call: AttentionCall) -> ForwardBackward | None:
    """Torch's flash kernel for a call; None where it does not run (fp32 on a GPU), and on AMD GPUs."""
    if call.query.device.type == "cpu":
        return TILES
    widest = call.query if call.query.shape[-1] >= call.value.shape[-1] else call.value
    return None if torch.version.hip is not None or not runs_flash(widest) else PACKED


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _as_wide(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, Dv]`` padded with zeros to the head dim that the kernel ran with."""
    missing = query.shape[-1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _trimmed(gradients: Gradients, call: AttentionCall) -> Gradients:
    dq, dk, dv = gradients
    size = call.query.shape[-1]
    return dq[..., :size], dk[..., :size], dv[..., : call.value.shape[-1]]
