"""Which rank of a group holds which tokens of a batch, so that documents stay together and ranks have equal work."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, inf
from typing import TYPE_CHECKING, Any, NamedTuple

from axattn.documents.boundaries import Ranges, cut, total

if TYPE_CHECKING:
    import numpy as np

EVEN = 1.06
"""Work of the busiest rank over the mean that is good enough; less costs more traffic."""
_SMALLEST_PART = 64
"""Documents of less than this fraction of a rank's work are not cut for the sake of balance."""


class Document(NamedTuple):
    """A document of a batch; tokens are counted through all rows, ``[0, B * S)``.

    Attributes:
        own: its real tokens, in order.
        stem: the tokens that it goes on from (`axattn.documents.boundaries.Segments`).
    """

    own: Ranges
    stem: Ranges = ()


class Piece(NamedTuple):
    """Consecutive tokens of one document that one rank holds.

    Attributes:
        start: the first of them.
        end: one past the last of them.
        document: index of the document.
        depth: number of tokens of the document and its stem before `start`.
    """

    start: int
    end: int
    document: int
    depth: int


@dataclass(frozen=True, eq=False)
class Placement:
    """Every token of a batch on one of P ranks.

    Attributes:
        documents: of the batch.
        ranges: for each rank the tokens that it holds, ascending.
        tokens: B * S.
        slots: tokens that every rank runs: those that it holds, and padding after them.
        memo: values derived from the placement once for all layers of a forward.
    """

    documents: tuple[Document, ...]
    ranges: tuple[Ranges, ...]
    tokens: int
    slots: int
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> int:
        """P."""
        return len(self.ranges)

    @cached_property
    def owner(self) -> np.ndarray:
        """int32 ``[B * S]``: the rank of each token."""
        import numpy as np

        found = np.empty(self.tokens, dtype=np.int32)
        for rank, ranges in enumerate(self.ranges):
            for a, b in ranges:
                found[a:b] = rank
        return found

    @cached_property
    def slot(self) -> np.ndarray:
        """int64 ``[B * S]``: the index of each token among those of its rank."""
        import numpy as np

        found = np.empty(self.tokens, dtype=np.int64)
        for ranges in self.ranges:
            at = 0
            for a, b in ranges:
                found[a:b] = np.arange(at, at + b - a)
                at += b - a
        return found

    def held(self, rank: int) -> np.ndarray:
        """int64: the tokens that a rank holds, ascending."""
        import numpy as np

        parts = [np.arange(a, b) for a, b in self.ranges[rank]]
        return np.concatenate([np.arange(0), *parts])

    @cached_property
    def _runs(self) -> list[Piece]:
        found = []
        for number, document in enumerate(self.documents):
            depth = total(document.stem)
            for a, b in document.own:
                found.append(Piece(a, b, number, depth))
                depth += b - a
        return sorted(found)

    def pieces(self, rank: int) -> Iterator[Piece]:
        """The pieces of documents that a rank holds, in the order of its tokens. Padding is in none of them."""
        runs = self._runs
        for a, b in self.ranges[rank]:
            at = max(bisect_right(runs, a, key=lambda run: run.start) - 1, 0)
            while at < len(runs) and runs[at].start < b:
                run = runs[at]
                first, last = max(a, run.start), min(b, run.end)
                if first < last:
                    yield Piece(first, last, run.document, run.depth + first - run.start)
                at += 1

    @cached_property
    def work(self) -> list[int]:
        """For each rank the pairs of a query and a key in causal attention without windows."""
        every = [list(self.pieces(rank)) for rank in range(self.ranks)]
        return [sum(_pairs(one.depth, one.end - one.start) for one in pieces) for pieces in every]

    @property
    def imbalance(self) -> float:
        """Work of the busiest rank over the mean; 1.0 without any work."""
        return max(self.work) * self.ranks / max(sum(self.work), 1)


def _pairs(depth: int, tokens: int) -> int:
    """The keys that `tokens` queries see, of which the first has `depth` tokens before it."""
    return tokens * depth + tokens * (tokens + 1) // 2


def place(documents: Sequence[Document], tokens: int, ranks: int, multiple: int = 1) -> Placement:
    """Place the tokens of a batch on ranks, as many on each.

    A document that is longer than a rank's share of the tokens is cut into 2 k chunks for k ranks, as few as it takes,
    of which the first takes chunks 0 and 2 k - 1, the second 1 and 2 k - 2, ... ("zig-zag": the first chunk of a causal
    document is the least work, the last one the most). Others stay whole. Longest first, each goes to the ranks with
    the least work that have room. If that leaves one rank with more than `EVEN` times the mean, documents of more work
    than twice the mean are cut too, then those of less, step by step.

    Args:
        documents: disjoint in their own tokens; tokens in none of them are padding.
        tokens: B * S.
        ranks: P.
        multiple: `Placement.slots` is a multiple of it.
    """
    ordered = sorted(documents, key=lambda one: -total(one.own))
    work = sum(_pairs(total(one.stem), total(one.own)) for one in ordered)
    best = _place(documents, ordered, inf, tokens, ranks, multiple)
    part = 2 * work / ranks
    while best.imbalance > EVEN and part >= work / ranks / _SMALLEST_PART:
        placed = _place(documents, ordered, part, tokens, ranks, multiple)
        best = min(best, placed, key=lambda one: one.imbalance)
        part *= 0.8
    return best


def _place(
    documents: Sequence[Document], ordered: Sequence[Document], part: float, tokens: int, ranks: int, multiple: int
) -> Placement:
    """As `place`: `ordered` are the documents, longest first, `part` is the most work that is left whole."""
    share = -(-tokens // ranks)
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    room, work = [share] * ranks, [0] * ranks

    def give(rank: int, document: Document, start: int, end: int) -> None:
        """Give tokens [start, end) of a document to a rank."""
        held[rank] += cut(document.own, start, end)
        room[rank] -= end - start
        work[rank] += _pairs(total(document.stem) + start, end - start)

    for document in ordered:
        length = total(document.own)
        parts = max(-(-length // share), ceil(_pairs(total(document.stem), length) / part))
        parts = min(parts, ranks, max(length // 2, 1))
        free = sorted((rank for rank in range(ranks) if room[rank] >= length // parts), key=lambda rank: work[rank])
        if len(free) >= parts:
            edges = [length * at // (2 * parts) for at in range(2 * parts + 1)]
            for at, rank in enumerate(free[:parts]):
                give(rank, document, edges[at], edges[at + 1])
                give(rank, document, edges[-2 - at], edges[-1 - at])
            continue
        start = 0
        for rank in sorted(range(ranks), key=lambda rank: -work[rank]):  # the first tokens are the least work
            end = min(start + max(room[rank], 0), length)
            if start < end:
                give(rank, document, start, end)
                start = end
        if start < length:
            give(min(range(ranks), key=lambda rank: -room[rank]), document, start, length)
    rank = 0
    for a, b in _padding(documents, tokens):
        while a < b:
            while room[rank] <= 0 and rank < ranks - 1:
                rank += 1
            taken = min(b - a, room[rank]) if rank < ranks - 1 else b - a
            held[rank].append((a, a + taken))
            room[rank] -= taken
            a += taken  # noqa: PLW2901
    longest = max(map(total, map(tuple, held)))
    slots = max(-(-longest // multiple) * multiple, multiple)
    return Placement(tuple(documents), tuple(map(_merged, held)), tokens, slots)


def _padding(documents: Sequence[Document], tokens: int) -> list[tuple[int, int]]:
    """The tokens that are in no document, as ranges."""
    found, at = [], 0
    for a, b in sorted(part for document in documents for part in document.own):
        if at < a:
            found.append((at, a))
        at = b
    return [*found, (at, tokens)] if at < tokens else found


def _merged(ranges: list[tuple[int, int]]) -> Ranges:
    """The same tokens ascending, with adjacent ranges joined."""
    found: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if a == b:
            continue
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return tuple(found)
