"""Exact packed attention and its gradient on a CPU, document by document with dense masks: for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .flash_backward import Packed


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[tokens, H, D]`` and logsumexp, float32 ``[H, tokens]``, of ``[tokens, H, D]``.

    A query without a key has output 0 and logsumexp infinity, as in flash attention.
    """
    out = torch.zeros_like(query)
    logsumexp = query.new_full((query.shape[1], query.shape[0]), float("inf"), dtype=torch.float32)
    for of_q, of_k in _documents(packed):
        q, k, v = _heads(query[of_q]), _widened(key[of_k], query), _widened(value[of_k], query)
        logits = _logits(q, k, packed)
        lse = logits.logsumexp(-1)
        lse = torch.where(lse == float("-inf"), float("inf"), lse)
        out[of_q] = ((logits - lse[..., None]).exp() @ v).transpose(0, 1).to(out.dtype)
        logsumexp[:, of_q] = lse
    return out, logsumexp


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    packed: Packed,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to query, key and value, from the output and logsumexp of the forward."""
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for of_q, of_k in _documents(packed):
        q, k, v = _heads(query[of_q]), _widened(key[of_k], query), _widened(value[of_k], query)
        g, o = _heads(grad[of_q]), _heads(out[of_q])
        p = (_logits(q, k, packed) - logsumexp[:, of_q, None]).exp()
        ds = p * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * packed.scale
        dq[of_q] = (ds @ k).transpose(0, 1).to(dq.dtype)
        dk[of_k] = _narrowed(ds.transpose(1, 2) @ q, key).to(dk.dtype)
        dv[of_k] = _narrowed(p.transpose(1, 2) @ g, value).to(dv.dtype)
    return dq, dk, dv


def _documents(packed: Packed) -> Iterator[tuple[slice, slice]]:
    q, k = packed.cu_q.tolist(), packed.cu_k.tolist()
    for q0, q1, k0, k1 in zip(q, q[1:], k, k[1:], strict=False):
        yield slice(q0, q1), slice(k0, k1)


def _heads(x: torch.Tensor) -> torch.Tensor:
    """``[tokens, H, D]`` as float32 ``[H, tokens, D]``."""
    return x.transpose(0, 1).float()


def _widened(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``[tokens, Hkv, D]`` as float32 ``[H, tokens, D]``: each head for the queries that share it."""
    return _heads(x).repeat_interleave(query.shape[1] // x.shape[1], 0)


def _narrowed(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[H, tokens, D]`` as ``[tokens, Hkv, D]``: the sum over the heads that share one."""
    return x.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1)


def _logits(q: torch.Tensor, k: torch.Tensor, packed: Packed) -> torch.Tensor:
    """``[H, S, T]``, minus infinity where a query does not attend; the last query sits at the last key."""
    rows = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    columns = torch.arange(k.shape[1], device=q.device)
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if packed.causal:
        seen &= columns <= rows
    if packed.window is not None:
        seen &= (rows - columns < packed.window) & (columns - rows < packed.window)
    return (q @ k.transpose(1, 2) * packed.scale).masked_fill(~seen, float("-inf"))
