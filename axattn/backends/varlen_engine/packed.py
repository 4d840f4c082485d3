"""Attention over a `Layout`: tile by tile on a CPU, as one packed call of torch's flash kernel on CUDA."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from axattn.backends import decoding, sdpa
from axattn.backends.base import keep_nan, on_gpu_of
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine.cpu_tiles import attention_over_tiles
from axattn.documents.boundaries import Ranges, total
from axattn.hf.transfers import on_device
from axattn.masks.varlen_layout import Layout


def over_layout(call: AttentionCall, layout: Layout) -> torch.Tensor:
    """Attention over a layout, that of the call's mask, without dropout.

    Returns:
        ``[B, S, H, Dv]``, computed by `sdpa` if torch's flash kernel does not run.
    """
    if call.query.shape[2] == 1 and (decoding.serves(call) or decoding.pays_on_cpu(call)):
        return decoding.single_query_attention(call, layout)
    query, key, value = call.query, call.key, call.value
    value_dim = value.shape[-1]
    query, key, value = one_head_dim(query, key, value)
    if query.device.type == "cpu":
        out = keep_nan(attention_over_tiles(query, key, value, layout, call.scale), query)
    elif runs_flash(query):
        out = _flash_varlen(query, key, value, layout, call.scale)
    else:
        return sdpa.sdpa(call)
    return out if out.shape[-1] == value_dim else out[..., :value_dim]


def runs_flash(query: torch.Tensor) -> bool:
    """Whether torch's flash kernel on a GPU takes ``[B, H, S, D]`` (of `one_head_dim`)."""
    size = query.shape[-1]
    return query.dtype in (torch.float16, torch.bfloat16) and size <= 256 and size % 8 == 0 and _has_flash(query.device)


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Whether torch's flash kernels run on a GPU: Ampere or newer; on ROCm torch checks that itself."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def one_head_dim(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three padded to one head dim, for flash kernels: zeros change neither q.k nor the output's first Dv."""
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
            lengths are int32 tensors, the maxima ints; causal masks are aligned bottom-right. It runs with the
            tensors' GPU as the current device.

    Returns:
        ``[B, S, H, D]``; zero at queries that no span covers. Without any span (a batch of padding only) the kernel is
        not called, because none takes zero sequences; gradients are then zero.
    """
    B, _, S, _ = query.shape
    index = packed_index(layout, query.device)
    q, k, v = packed(query, index.queries), packed(key, index.keys), packed(value, index.keys)
    if index.sequences:
        with on_gpu_of(query):
            out = kernel(q, k, v, *index.lengths)
    else:
        out = q + (k.sum() + v.sum())  # empty, with gradients
    return unpacked(out, index.queries, B, S)


def packed(x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """``[B, H, S, D]`` as ``[tokens, H, D]``: the tokens at the flat indices `tokens`, or all."""
    flat = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
    return flat if tokens is None else flat.index_select(0, tokens)


def summed(x: torch.Tensor, tokens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """`unpacked` where `tokens` holds a token several times: the sum of its values."""
    x = x.new_zeros(rows * length, *x.shape[1:]).index_add(0, tokens, x)
    return x.view(rows, length, *x.shape[1:])


def unpacked(x: torch.Tensor, tokens: torch.Tensor | None, rows: int, length: int) -> torch.Tensor:
    """``[tokens, H, D]`` as ``[B, S, H, D]``, zero at tokens that are not in `tokens`."""
    if tokens is not None:
        x = x.new_zeros(rows * length, *x.shape[1:]).index_copy(0, tokens, x)
    return x.view(rows, length, *x.shape[1:])


@functools.cache
def _takes_enable_gqa() -> bool:
    """torch 2.12 added ``enable_gqa``; earlier versions take grouped heads without it."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


class _Sequence(NamedTuple):
    """Queries ``[q0, q1)`` of one row, and the ranges of its keys: the last one is the span's, a stem's come before."""

    row: int
    q0: int
    q1: int
    keys: Ranges


def _in_order(layout: Layout) -> list[_Sequence]:
    """Each span and row as a sequence, in the order of the flattened tokens."""
    return sorted(
        _Sequence(row, s.q0, s.q1, (*stem, (s.k0, s.k1)))
        for s, stem in layout.with_stems
        for row in range(s.row0, s.row1)
    )


def span_lengths(layout: Layout) -> tuple[list[int], list[int]]:
    """Query and key lengths of each sequence, in the order of `packed_call`."""
    sequences = _in_order(layout)
    return [one.q1 - one.q0 for one in sequences], [total(one.keys) for one in sequences]


class PackedIndex(NamedTuple):
    """The spans of a layout as cu_seqlens and token indices.

    Attributes:
        cu_q: int32 ``[sequences + 1]``.
        cu_k: int32 ``[sequences + 1]``.
        max_q: longest sequence of queries.
        max_k: longest sequence of keys.
        queries: int64, the flat indices of real queries; None if the spans leave no gap.
        keys: the same for keys; with stems, an index for each sequence that a key is in.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    queries: torch.Tensor | None
    keys: torch.Tensor | None

    @property
    def sequences(self) -> int:
        """The number of sequences."""
        return self.cu_q.shape[0] - 1

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """The length arguments of a kernel."""
        return self.cu_q, self.cu_k, self.max_q, self.max_k


def packed_index(layout: Layout, device: torch.device) -> PackedIndex:
    """The spans of a layout in packed order, made once for all layers that share it."""
    return layout.kept("packed", lambda: _packed_index(layout, device))


def _packed_index(layout: Layout, device: torch.device) -> PackedIndex:
    S, T = layout.q_length, layout.kv_length
    if layout.whole_rows and S and T:  # no transfer from the host
        tokens = layout.rows * S, layout.rows * T
        ends = [
            torch.arange(0, total + 1, each, dtype=torch.int32, device=device)
            for total, each in zip(tokens, (S, T), strict=True)
        ]
        return PackedIndex(ends[0], ends[0] if S == T else ends[1], S, T, None, None)
    sequences = _in_order(layout)
    q_lengths, k_lengths = span_lengths(layout)

    def cumulative(lengths: list[int]) -> torch.Tensor:
        return on_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)

    def index(ranges: list[tuple[int, int]], tokens: int) -> torch.Tensor | None:
        if sum(b - a for a, b in ranges) == tokens and not layout.stems:
            return None
        return on_device(torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in ranges)]), device)

    cu_q = cumulative(q_lengths)
    return PackedIndex(
        cu_q,
        # one tensor if both are equal: torch 2.15 then takes cuDNN's kernel for causal rows on Hopper and Blackwell
        cu_q if k_lengths == q_lengths else cumulative(k_lengths),
        max(q_lengths, default=0),
        max(k_lengths, default=0),
        index([(row * S + q0, row * S + q1) for row, q0, q1, _ in sequences], layout.rows * S),
        index([(row * T + a, row * T + b) for row, _, _, keys in sequences for a, b in keys], layout.rows * T),
    )
