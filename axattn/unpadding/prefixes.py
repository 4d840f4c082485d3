"""Common beginnings of documents: which tokens of a batch need to run, and which documents go on from which."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from axattn.documents.boundaries import Ranges, cut
from axattn.documents.prefix_groups import SHORTEST

if TYPE_CHECKING:
    import numpy as np

WORTH = 0.05
"""Sharing must leave out this share of a batch's tokens; below it the row's bookkeeping may cost what it saves."""


class SharedRow(NamedTuple):
    """One row in which every common beginning runs once.

    Attributes:
        tokens: int64 ``[M]``: which of the batch's N tokens the row holds.
        source: int64 ``[N]``: where each of the batch's tokens is in the row.
        boundaries: of the row's documents.
        stems: for each of them, the ranges of the row that it goes on from.
    """

    tokens: np.ndarray
    source: np.ndarray
    boundaries: tuple[int, ...]
    stems: tuple[Ranges, ...]


def shared_row(values: np.ndarray, lengths: Sequence[int]) -> SharedRow | None:
    """The row for a batch of documents; None if they share too little.

    Sorted, each document's longest common beginning with any other is the one with its neighbour, so one comparison
    per document finds the whole tree, from the middle of documents too.

    Args:
        values: int64 ``[N, k]``: what decides a token's output besides the tokens before it (its id, its position).
        lengths: of the documents, which follow each other in `values`.
    """
    import numpy as np

    values = np.ascontiguousarray(values)
    edges = [0, *accumulate(lengths)]
    documents = [values[a:b] for a, b in pairwise(edges)]
    keys = [document.tobytes() for document in documents]
    source = np.empty(len(values), dtype=np.int64)
    kept: list[np.ndarray] = []
    boundaries, stems = [0], []
    path: Ranges = ()
    before = -1
    for number in sorted(range(len(documents)), key=keys.__getitem__):
        document, start, end = documents[number], edges[number], boundaries[-1]
        same = 0 if before < 0 else _common(documents[before], document)
        if same:
            source[start : start + same] = source[edges[before] : edges[before] + same]
        own = len(document) - same
        stem = cut(path, 0, same)
        path = stem
        if own:
            source[start + same : start + len(document)] = np.arange(end, end + own)
            kept.append(np.arange(start + same, start + len(document)))
            boundaries.append(end + own)
            stems.append(stem)
            path = (
                (*stem, (end, end + own)) if not stem or stem[-1][1] != end else (*stem[:-1], (stem[-1][0], end + own))
            )
        before = number
    if len(values) - boundaries[-1] < WORTH * len(values):
        return None
    return SharedRow(np.concatenate(kept), source, tuple(boundaries), tuple(stems))


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The number of tokens with which both begin; 0 if it is not worth sharing."""
    length = min(len(one), len(other))
    same = (one[:length] == other[:length]).all(-1)
    found = length if same.all() else int(same.argmin())
    return found if found >= SHORTEST else 0
