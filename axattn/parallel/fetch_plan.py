"""Which keys each rank fetches when tokens are placed on ranks by document. Pure: numbers only, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from axattn.documents.boundaries import Ranges, cut
from axattn.documents.placement import Placement
from axattn.masks.varlen_layout import Layout, Span

if TYPE_CHECKING:
    import numpy as np


class Rule(NamedTuple):
    """Which tokens of its document a query attends to: `causal`, `window` and `chunk` as in `axattn.spec.Need`."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None


class Queries(NamedTuple):
    """Consecutive queries ``[start, end)`` of one document on one rank.

    Attributes:
        start: the first of them.
        end: one past the last of them.
        others: the keys besides their own that they attend to; if causal those before them, in order.
    """

    start: int
    end: int
    others: Ranges


def queries_of(placement: Placement, rank: int, rule: Rule) -> Iterator[Queries]:
    """The queries of a rank, with the keys that they attend to; those of a chunked document are cut at its chunks.

    Queries that attend to a window to both sides need their whole document on one rank.
    """
    for start, end, number, depth in placement.pieces(rank):
        document = placement.documents[number]
        path = (*document.stem, *document.own)
        if not rule.causal:
            last = depth + end - start
            yield Queries(start, end, (*cut(path, 0, depth), *cut(path, last, last + placement.tokens)))
            continue
        at, last = depth, depth + end - start
        while at < last:
            low = 0 if rule.chunk is None else at - at % rule.chunk
            stop = last if rule.chunk is None else min(low + rule.chunk, last)
            if rule.window is not None:
                low = max(low, at - rule.window + 1)
            yield Queries(start + at - depth, start + stop - depth, cut(path, low, at))
            at = stop


def fetched(placement: Placement, rule: Rule) -> list[np.ndarray]:
    """For each rank the tokens of other ranks whose keys its queries attend to, by owner, then ascending. Computed once
    for a placement."""
    if rule not in placement.memo:
        placement.memo[rule] = _fetched(placement, rule)
    found: list[np.ndarray] = placement.memo[rule]
    return found


def _fetched(placement: Placement, rule: Rule) -> list[np.ndarray]:
    import numpy as np

    owner, found = placement.owner, []
    for rank in range(placement.ranks):
        needed = np.zeros(placement.tokens, dtype=bool)
        for one in queries_of(placement, rank, rule):
            for a, b in one.others:
                needed[a:b] = True
        tokens = np.flatnonzero(needed & (owner != rank))
        found.append(tokens[np.argsort(owner[tokens], kind="stable")])
    return found


def layout_of(placement: Placement, rank: int, rule: Rule, tokens: np.ndarray) -> Layout:
    """The attention of a rank's queries over its own keys, and after them the keys of `tokens` (of `fetched`)."""
    import numpy as np

    where = np.where(placement.owner == rank, placement.slot, -1)
    where[tokens] = placement.slots + np.arange(len(tokens))
    spans, stems = [], []
    for start, end, others in queries_of(placement, rank, rule):
        first = int(where[start])
        last = first + end - start
        spans.append(Span(0, 1, first, last, first, last))
        stems.append(tuple(part for a, b in others for part in _runs(where[a:b])))
    stems = stems if any(stems) else []
    return Layout(
        tuple(spans), rule.causal, rule.window, 1, placement.slots, placement.slots + len(tokens), tuple(stems)
    )


def _runs(at: np.ndarray) -> list[tuple[int, int]]:
    """Indices as ranges."""
    import numpy as np

    edges = [0, *(np.flatnonzero(np.diff(at) != 1) + 1).tolist(), len(at)]
    return [(int(at[a]), int(at[a]) + b - a) for a, b in pairwise(edges)]
