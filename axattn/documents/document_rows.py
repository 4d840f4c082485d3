"""The documents of packed rows as separate rows, for layers that must run each document on its own."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from axattn.documents.boundaries import Segments

_MAX_PADDED_SIZE = 1.5
"""All documents run in one call if padding adds at most half of their tokens."""


class Group(NamedTuple):
    """Documents of similar lengths as padded rows.

    Attributes:
        tokens: int64 ``[documents, longest]``, the flat index of each token; padding repeats a document's last token.
        real: bool ``[documents, longest]``, False for padding.
        places: int64 ``[N]``: the indices of the real tokens in ``[documents * longest]``.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    places: torch.Tensor

    def select_real(self, x: torch.Tensor) -> torch.Tensor:
        """The real tokens of an output of these rows: ``[documents, longest, ...]`` → ``[N, ...]``."""
        return x.flatten(0, 1).index_select(0, self.places)


class Documents(NamedTuple):
    """The documents of packed rows as separate rows.

    Attributes:
        groups: together they hold every token once.
        back: int64 ``[B * S]``: the index of each token of the packed rows in the concatenated real tokens of `groups`.
    """

    groups: tuple[Group, ...]
    back: torch.Tensor

    def in_packed_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Reorders the real tokens of each group, ``[N, ...]``, to those of the packed rows: ``[B * S, ...]``."""
        return torch.cat(parts).index_select(0, self.back)


def as_rows(segments: Segments, device: torch.device) -> Documents:
    """The documents of a forward as rows, computed once for all layers."""
    if device not in segments.memo:
        segments.memo[device] = _as_rows(segments, device)
    found: Documents = segments.memo[device]
    return found


def _as_rows(segments: Segments, device: torch.device) -> Documents:
    spans = [
        (row * segments.length + a, b - a) for row, edges in enumerate(segments.boundaries) for a, b in pairwise(edges)
    ]
    groups, order = [], []
    for members in _group_by_length(spans):
        start, length = torch.tensor(members).unbind(1)
        at = torch.arange(int(length.max()))
        real = at < length[:, None]
        tokens = start[:, None] + torch.minimum(at, length[:, None] - 1)
        order.append(tokens[real])
        groups.append(Group(*(x.to(device) for x in (tokens, real, real.flatten().nonzero()[:, 0]))))
    return Documents(tuple(groups), torch.cat(order).argsort().to(device))


def _group_by_length(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """One group for all spans if that adds little padding, else groups whose lengths differ by less than a factor 2."""
    lengths = [length for _, length in spans]
    if len(spans) * max(lengths) <= _MAX_PADDED_SIZE * sum(lengths):
        return [spans]
    found: dict[int, list[tuple[int, int]]] = {}
    for span in spans:
        found.setdefault(span[1].bit_length(), []).append(span)
    return list(found.values())
