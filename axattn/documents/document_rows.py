"""Documents of packed rows laid beside each other as rows, for layers that run each document as it would run alone."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from axattn.documents.boundaries import Segments

_LOOSE = 1.5
"""Padding up to half of the tokens is taken for one call instead of several."""


class Group(NamedTuple):
    """Documents of like lengths as rows.

    Attributes:
        tokens: int64 ``[documents, longest]``, the flat index of each token; behind its end a document's last again.
        real: bool of that shape, False behind the end of a document.
        places: int64 ``[N]``: where in ``[documents * longest]`` the real ones are.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    places: torch.Tensor

    def real_ones(self, x: torch.Tensor) -> torch.Tensor:
        """The real tokens of what the rows gave: ``[documents, longest, ...]`` → ``[N, ...]``."""
        return x.flatten(0, 1).index_select(0, self.places)


class Documents(NamedTuple):
    """The documents of packed rows as rows of their own.

    Attributes:
        groups: all of them, every token of the rows in one.
        back: int64 ``[B * S]``: where each token of the rows is among the real tokens of the groups, one after another.
    """

    groups: tuple[Group, ...]
    back: torch.Tensor

    def in_place(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The real tokens of each group, ``[N, ...]``, where they are in the rows: ``[B * S, ...]``."""
        return torch.cat(parts).index_select(0, self.back)


def as_rows(segments: Segments, device: torch.device) -> Documents:
    """The documents of a forward as rows, worked out once for all layers."""
    if device not in segments.memo:
        segments.memo[device] = _as_rows(segments, device)
    found: Documents = segments.memo[device]
    return found


def _as_rows(segments: Segments, device: torch.device) -> Documents:
    spans = [
        (row * segments.length + a, b - a) for row, edges in enumerate(segments.boundaries) for a, b in pairwise(edges)
    ]
    groups, order = [], []
    for members in _alike(spans):
        start, length = torch.tensor(members).unbind(1)
        at = torch.arange(int(length.max()))
        real = at < length[:, None]
        tokens = start[:, None] + torch.minimum(at, length[:, None] - 1)
        order.append(tokens[real])
        groups.append(Group(*(x.to(device) for x in (tokens, real, real.flatten().nonzero()[:, 0]))))
    return Documents(tuple(groups), torch.cat(order).argsort().to(device))


def _alike(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Spans in groups: one where that wastes little, else those of up to twice the shortest's length together."""
    lengths = [length for _, length in spans]
    if len(spans) * max(lengths) <= _LOOSE * sum(lengths):
        return [spans]
    found: dict[int, list[tuple[int, int]]] = {}
    for span in spans:
        found.setdefault(span[1].bit_length(), []).append(span)
    return list(found.values())
