"""Hadamard matrices by Sylvester's construction: orthogonal up to their size, of 1 and -1, their own transposes."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=32)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[size, size]``, a power of two; times itself it is `size` times the identity."""
    matrix: torch.Tensor = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device, dtype)
