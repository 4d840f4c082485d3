"""A strict stand-in for sageattention 1.0.6 on a CPU: its signatures, its traps as errors, its lack of a gradient."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from tests.fakes import flash

calls: list[str] = []
"""Names of the functions called."""


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sizes: tuple[int, ...], ignored: dict[str, Any]) -> None:
    if ignored:
        raise TypeError(f"the library swallows {sorted(ignored)} without a word")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        raise AssertionError("Input tensors must be in dtype of torch.float16, torch.bfloat16, or torch.float32")
    if q.shape[-1] not in sizes:
        raise AssertionError(f"headdim should be in {list(sizes)}.")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise AssertionError("Last dim of qkv must be contiguous.")


@torch.no_grad()
def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **ignored: Any,
) -> torch.Tensor:
    """``[B, H, S, D]``, or ``[B, S, H, D]`` with ``NHD``."""
    calls.append("sageattn")
    _check(q, k, v, (64, 96, 128), ignored)
    axis = 1 if tensor_layout == "NHD" else 2
    if smooth_k:
        k -= k.mean(axis, keepdim=True)  # the caller's own tensor, as the library does
    if not is_causal and k.shape[axis] % 64:
        raise RuntimeError("padded keys stay unmasked: the result would be wrong")
    if is_causal and q.shape[axis] != k.shape[axis]:
        raise RuntimeError("causal is for as many queries as keys")
    rows = [x.transpose(1, 2) if axis == 2 else x for x in (q, k, v)]
    outs = [_one(*parts, sm_scale, is_causal) for parts in zip(*rows, strict=True)]
    out = torch.stack(outs)
    return out.transpose(1, 2) if axis == 2 else out


@torch.no_grad()
def sageattn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **ignored: Any,
) -> torch.Tensor:
    """``[tokens, H, D]``."""
    calls.append("sageattn_varlen")
    _check(q, k, v, (64, 128), ignored)
    if smooth_k:
        raise RuntimeError("one mean over all documents: they would see each other")
    if not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise RuntimeError("fewer queries than keys are aligned top-left")
    if not is_causal:
        raise RuntimeError("padded keys stay unmasked: the result would be wrong")
    edges = cu_seqlens_q.tolist()
    return torch.cat([_one(q[a:b], k[a:b], v[a:b], sm_scale, True) for a, b in pairwise(edges)])


def _one(q: Any, k: Any, v: Any, scale: float | None, causal: bool) -> torch.Tensor:
    return flash._with_logsumexp(q, k, v.to(torch.float16), scale, causal, (-1, -1), 0.0)[0].to(q.dtype)
