"""The documents of packed rows as separate rows, for layers that must run each document on its own."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from axattn.documents.boundaries import Segments, total

_MAX_PADDED_SIZE = 1.5
"""All documents run in one call if padding adds at most half of their tokens."""


class Group(NamedTuple):
    """Documents of similar lengths as padded rows. The stem of a document is in its row, and runs again.

    Attributes:
        tokens: int64 ``[documents, longest]``, the flat index of each token; padding repeats a document's last token.
        real: bool ``[documents, longest]``, False for padding.
        places: int64 ``[N]``: the indices of the documents' own tokens in ``[documents * longest]``.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    places: torch.Tensor

    def select_real(self, x: torch.Tensor) -> torch.Tensor:
        """The documents' own tokens of an output of these rows: ``[documents, longest, ...]`` → ``[N, ...]``."""
        return x.flatten(0, 1).index_select(0, self.places)


class Documents(NamedTuple):
    """The documents of packed rows as separate rows.

    Attributes:
        groups: together they hold every token once as a document's own.
        back: int64 ``[B * S]``: the index of each token of the packed rows in the concatenated own tokens of `groups`.
    """

    groups: tuple[Group, ...]
    back: torch.Tensor

    def in_packed_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Reorders the own tokens of each group, ``[N, ...]``, to those of the packed rows: ``[B * S, ...]``."""
        return torch.cat(parts).index_select(0, self.back)


def as_rows(segments: Segments, device: torch.device) -> Documents:
    """The documents of a forward as rows, computed once for all layers."""
    if device not in segments.memo:
        segments.memo[device] = _as_rows(segments, device)
    found: Documents = segments.memo[device]
    return found


def _as_rows(segments: Segments, device: torch.device) -> Documents:
    spans = []
    for row, edges in enumerate(segments.boundaries):
        first = row * segments.length
        for number, (a, b) in enumerate(pairwise(edges)):
            stem = () if segments.stems is None else segments.stems[row][number]
            before = [torch.arange(first + x, first + y) for x, y in stem]
            spans.append(_Span(first + a, b - a + total(stem), torch.cat([torch.arange(0), *before])))
    groups, order = [], []
    for members in _group_by_length(spans):
        length = torch.tensor([span.length for span in members])
        front = torch.tensor([len(span.stem) for span in members])
        start = torch.tensor([span.start for span in members])
        at = torch.arange(int(length.max()))
        real = at < length[:, None]
        own = real & (at >= front[:, None])
        tokens = start[:, None] + torch.minimum(at, length[:, None] - 1) - front[:, None]
        for row, span in zip(tokens, members, strict=True):
            row[: len(span.stem)] = span.stem
        order.append(tokens[own])
        groups.append(Group(*(x.to(device) for x in (tokens, real, own.flatten().nonzero()[:, 0]))))
    return Documents(tuple(groups), torch.cat(order).argsort().to(device))


class _Span(NamedTuple):
    """A document: the flat index of its first own token, its length with its stem, the flat indices of the stem."""

    start: int
    length: int
    stem: torch.Tensor


def _group_by_length(spans: list[_Span]) -> list[list[_Span]]:
    """One group for all spans if that adds little padding, else groups whose lengths differ by less than a factor 2."""
    lengths = [span.length for span in spans]
    if len(spans) * max(lengths) <= _MAX_PADDED_SIZE * sum(lengths):
        return [spans]
    found: dict[int, list[_Span]] = {}
    for span in spans:
        found.setdefault(span.length.bit_length(), []).append(span)
    return list(found.values())
