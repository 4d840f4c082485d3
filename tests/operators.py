"""Inputs of the operators of compiled graphs, and their masks token by token."""

from __future__ import annotations

from typing import Any

import torch

RULES = [
    (True, None, None),
    (False, None, None),
    (True, 4, None),
    (False, 4, None),
    (True, None, 3),
]


def inputs(rows: int = 2, length: int = 12) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]


def documents() -> torch.Tensor:
    return torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 2 + [2]])


def padding(holes: bool) -> torch.Tensor:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 10:] = False
    mask[1, 3 if holes else 0] = False
    return mask


def rule(ids: Any, real: Any, causal: bool, window: int | None, chunk: int | None) -> torch.Tensor:
    """The same mask, token by token."""
    seen = torch.zeros(2, 12, 12, dtype=torch.bool)
    for row in range(2):
        for q in range(12):
            for k in range(12):
                same = ids is None or bool(ids[row, q] == ids[row, k])
                first = 0 if real is None else int(real[row].long().argmax())
                start = first if ids is None else max(first, int((ids[row] == ids[row, q]).long().argmax()))
                here = (not causal or k <= q) and (window is None or abs(q - k) < window)
                here = here and (chunk is None or (q - start) // chunk == (k - start) // chunk)
                seen[row, q, k] = same and here and (real is None or bool(real[row, k]))
    return seen[:, None]
