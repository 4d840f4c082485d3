"""torch's own flash kernels of a GPU in plain torch: the operators under ``torch.nn.attention.varlen``, as strict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.fakes import flash

calls: list[str] = []
"""``forward`` and ``backward``, in order."""


def _sequences(cu_q: Any, cu_k: Any) -> Iterator[tuple[slice, slice]]:
    q, k = cu_q.tolist(), cu_k.tolist()
    for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
        yield slice(a, b), slice(c, d)


def _require(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any) -> None:
    flash._check(q, k, v)
    flash._lengths(lengths[0], lengths[1], q, k, lengths[2], lengths[3])
    if any(x.ndim != 3 or x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("packed tokens [tokens, H, D] with a contiguous last dimension")


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """``aten::_flash_attention_forward``: ``[tokens, H, D]`` and the logsumexp ``[H, tokens]``."""
    calls.append("forward")
    _require(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    if dropout_p or return_debug_mask or any(x is not None for x in (seqused_k, alibi_slopes, block_table)):
        raise NotImplementedError
    sides = tuple(-1 if side is None else side for side in (window_size_left, window_size_right))
    out = torch.zeros_like(query)
    lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=torch.float32)
    for a, b in _sequences(cum_seq_q, cum_seq_k):
        part = flash._with_logsumexp(query[a], key[b], value[b], scale, is_causal, sides, 0.0)
        out[a], lse[:, a] = part[0].to(query.dtype), part[1]
    state, none = torch.zeros(2, dtype=torch.uint64), torch.empty(0)
    return out, lse, state, none, none


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``aten::_flash_attention_backward``: from the output and the logsumexp that it is given, as the kernel does."""
    calls.append("backward")
    _require(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    if grad_out.shape != out.shape or out.shape != query.shape or grad_out.dtype != query.dtype:
        raise RuntimeError("the gradient and the output must be like the query")
    if logsumexp.shape != (query.shape[1], query.shape[0]) or logsumexp.dtype != torch.float32:
        raise RuntimeError(f"logsumexp must be float32 [{query.shape[1]}, {query.shape[0]}]")
    if dropout_p or rng_state.dtype != torch.uint64:
        raise NotImplementedError
    left, right = (-1 if side is None else side for side in (window_size_left, window_size_right))
    group, factor = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5 if scale is None else scale
    grads = tuple(torch.zeros_like(x) for x in (query, key, value))
    for a, b in _sequences(cum_seq_q, cum_seq_k):
        q, g, o = (x[a].float().transpose(0, 1) for x in (query, grad_out, out))
        k, v = (x[b].float().repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
        S, T = q.shape[1], k.shape[1]
        rows, columns = torch.arange(S)[:, None] + T - S, torch.arange(T)
        seen = torch.ones(S, T, dtype=torch.bool)
        if left >= 0:
            seen &= columns >= rows - left
        if right >= 0 or is_causal:
            seen &= columns <= rows + (0 if is_causal else right)
        weights = (q @ k.transpose(1, 2) * factor - logsumexp[:, a, None]).masked_fill(~seen, float("-inf")).exp()
        wide = weights * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * factor
        for grad, part, span in zip(
            grads, (wide @ k, wide.transpose(1, 2) @ q, weights.transpose(1, 2) @ g), (a, b, b), strict=True
        ):
            heads = part if part.shape[0] == grad.shape[1] else part.unflatten(0, (-1, group)).sum(1)
            grad[span] = heads.transpose(0, 1).to(grad.dtype)
    return grads


FLASH_OPS = {
    torch.ops.aten._flash_attention_forward.default: _forward,
    torch.ops.aten._flash_attention_backward.default: _backward,
}
"""Operators of torch without a kernel on the CPU, and what stands in for them."""
