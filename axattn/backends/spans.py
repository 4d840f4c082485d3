"""Attention over a `Layout`: tile by tile on a CPU, as one packed call of torch's flash kernel on CUDA."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from axattn.backends import dense
from axattn.backends.base import keep_nan
from axattn.backends.tiles import attention_over_tiles
from axattn.call import AttentionCall
from axattn.layouts import Layout


def over_layout(call: AttentionCall, layout: Layout) -> torch.Tensor:
    """Attention over the spans of a layout, with no mask and no dropout; returns ``[B, S, H, Dv]``."""
    query, key, value = call.query, call.key, call.value
    value_dim = value.shape[-1]
    query, key, value = one_head_dim(query, key, value)
    if query.device.type == "cpu":
        out = keep_nan(attention_over_tiles(query, key, value, layout, call.scale), query)
    elif (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and _has_flash(query.device)
    ):
        out = _flash_varlen(query, key, value, layout, call.scale)
    else:
        return dense.sdpa(call)
    return out if out.shape[-1] == value_dim else out[..., :value_dim]


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Whether torch's flash kernels run on a GPU: Ampere or newer; on ROCm torch sorts that out by itself."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def one_head_dim(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three with one head dim, which flash kernels want: zeros add nothing to q.k, nor to the output's first Dv."""
    size = max(query.shape[-1], value.shape[-1])
    if query.shape[-1] == value.shape[-1]:
        return query, key, value
    return F.pad(query, (0, size - query.shape[-1])), F.pad(key, (0, size - key.shape[-1])), _widen(value, size)


def _widen(value: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(value, (0, size - value.shape[-1]))


def _flash_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
) -> torch.Tensor:
    """CUDA: the spans as one packed call of torch's flash kernel (16 bit, D <= 256, D % 8 == 0)."""
    from torch.nn.attention.varlen import varlen_attn

    run: Callable[..., torch.Tensor] = varlen_attn  # type: ignore[assignment]  # a tuple only if return_aux is given
    grouped: dict[str, Any] = {}
    if _takes_enable_gqa() and key.shape[1] != query.shape[1]:
        grouped["enable_gqa"] = True
    left = -1 if layout.window is None else layout.window - 1
    window = (left, 0 if layout.causal else left)

    def kernel(*packed: Any) -> torch.Tensor:
        return run(*packed, scale=scale, window_size=window, **grouped)

    return packed_call(query, key, value, layout, kernel)


def packed_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    kernel: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """The spans of a layout as one call of a variable-length kernel.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, D]``.
        layout: the spans.
        kernel: ``(q [tokens, H, D], k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)`` → ``[tokens, H, D]``; the
            lengths are int32 tensors, the maxima ints; causal masks are aligned bottom-right.

    Returns:
        ``[B, S, H, D]``; zero at queries that no span covers.
    """
    B, H, S, D = query.shape
    if "packed" not in layout.memo:
        layout.memo["packed"] = _packed_index(layout, query.device)
    cu_q, cu_k, max_q, max_k, index_q, index_k = layout.memo["packed"]
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], D) for x in (query, key, value))
    if index_q is not None:
        q = q.index_select(0, index_q)
    if index_k is not None:
        k, v = k.index_select(0, index_k), v.index_select(0, index_k)
    out = kernel(q, k, v, cu_q, cu_k, max_q, max_k)
    if index_q is None:
        return out.view(B, S, H, D)
    return out.new_zeros(B * S, H, D).index_copy(0, index_q, out).view(B, S, H, D)


@functools.cache
def _takes_enable_gqa() -> bool:
    """torch 2.12 added ``enable_gqa``; before it grouped heads pass unchecked."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _in_order(layout: Layout) -> list[tuple[int, int, int, int, int]]:
    """``(row, q0, q1, k0, k1)`` of each span and row, in the order of the flattened tokens."""
    return sorted((row, s.q0, s.q1, s.k0, s.k1) for s in layout.spans for row in range(s.row0, s.row1))


def span_lengths(layout: Layout) -> tuple[list[int], list[int]]:
    """Queries and keys of each sequence, in the order in which `packed_call` lays them out."""
    spans = _in_order(layout)
    return [q1 - q0 for _, q0, q1, _, _ in spans], [k1 - k0 for *_, k0, k1 in spans]


def _packed_index(
    layout: Layout, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None, torch.Tensor | None]:
    """cu_seqlens, max lengths and, where spans leave gaps, the flat indices of real queries and keys."""
    spans = _in_order(layout)
    q_lengths = [q1 - q0 for _, q0, q1, _, _ in spans]
    k_lengths = [k1 - k0 for *_, k0, k1 in spans]

    def cumulative(lengths: list[int]) -> torch.Tensor:
        return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)

    def index(ranges: list[tuple[int, int]], total: int) -> torch.Tensor | None:
        if sum(b - a for a, b in ranges) == total:
            return None
        return torch.cat([torch.arange(a, b) for a, b in ranges]).to(device)

    S, T = layout.q_length, layout.kv_length
    return (
        cumulative(q_lengths),
        cumulative(k_lengths),
        max(q_lengths, default=0),
        max(k_lengths, default=0),
        index([(row * S + q0, row * S + q1) for row, q0, q1, _, _ in spans], layout.rows * S),
        index([(row * T + k0, row * T + k1) for row, _, _, k0, k1 in spans], layout.rows * T),
    )
