"""A strict stand-in for torchao's fp8 quantiser (torchao 0.17 and 0.18): the same checks and shapes, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

STORAGE = torch.float8_e4m3fn
"""What numbers are kept in; float32 leaves them unrounded."""
LARGEST = 448.0  # of e4m3fn

calls: list[torch.Size] = []
"""Shapes of the queries that came."""


class Fp8(NamedTuple):
    values: torch.Tensor
    undo: torch.Tensor


def scales(peak: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What to multiply with, and what undoes it. A Python number over a tensor would be a reciprocal, rounded twice."""
    there, largest = peak > 1e-12, torch.full_like(peak, LARGEST)
    return torch.where(there, largest / peak, 1.0), torch.where(there, peak / largest, 1.0)


def fp8_sdpa_quantize(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``[B, H, S, D]`` in fp8 three times, then what to multiply with: float32 ``[B, Hkv]`` three times."""
    calls.append(q.shape)
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError("K and V shape mismatch, or Q does not fit them")
    if q.shape[1] % k.shape[1]:
        raise ValueError("Q head count must be a multiple of K head count")
    stored, undo = [], []
    for x in (q, k, v):
        peak = x.float().abs().amax((2, 3)).unflatten(1, (k.shape[1], -1)).amax(-1)
        scale, descale = scales(peak)
        wide = scale.repeat_interleave(x.shape[1] // k.shape[1], 1)[..., None, None]
        stored.append((x.contiguous().float() * wide).to(STORAGE))
        undo.append(descale)
    return (*stored, *undo)
