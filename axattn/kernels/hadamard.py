"""Hadamard matrices by Sylvester's construction: entries 1 and -1, symmetric, orthogonal up to a factor."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=32)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[size, size]``, for a power of two; its square is `size` times the identity."""
    matrix: torch.Tensor = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device, dtype)
