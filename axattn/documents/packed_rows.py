"""Which documents share a row: as few rows as possible, or rows and ranks of equal work. Lengths only, no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

LINEAR_COST = 12 * 4096
"""`document_work` of a token in linear layers, for a hidden size of 4,096."""


def document_work(tokens: int, linear_cost: int, shared: int = 0) -> int:
    """FLOPs of a document, in units of one pair of tokens in causal attention.

    The forward of a decoder layer of hidden size h takes 24 h² FLOPs per token in its linear layers and 2 h L² in
    causal attention over a document of L tokens (Kaplan et al., arXiv:2001.08361, table 1); the backward takes twice
    both. Divided by 2 h: 12 h per token, and L².

    Args:
        tokens: L.
        linear_cost: linear layers per token: 12 h, or from the parameters that a token runs through,
            parameters / (layers * query heads * head dim).
        shared: tokens at its beginning that another document has run already (`share_prefixes=True`).
    """
    return (tokens - shared) * (linear_cost + tokens + shared)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into as few rows as first-fit decreasing finds (at most 11/9 of the optimum + 6/9; Dósa 2007).

    Args:
        lengths: size of each item, none above `capacity`.
        capacity: size of a row.

    Returns:
        Item numbers by row; rows in order of their first item, items of a row in the order given.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((row for row, room in enumerate(free) if room >= lengths[item]), None)
        if at is None:
            rows.append([])
            free.append(capacity)
            at = len(rows) - 1
        rows[at].append(item)
        free[at] -= lengths[item]
    return sorted(sorted(row) for row in rows)


def balanced_rows(
    lengths: Sequence[int], work: Sequence[int], capacity: int | None, ranks: int = 1
) -> list[list[list[int]]]:
    """Pack items into rows of equal work, and rows onto ranks of equal work, equally many on each.

    Both by "longest processing time first" (Graham 1969): the item with the most work goes to the row with the least
    that has room for it. There are as many rows as first-fit decreasing finds, rounded up to a multiple of `ranks`,
    and more only if an item has no room.

    Args:
        lengths: size of each item, none above `capacity`.
        work: of each item, above 0.
        capacity: size of a row; None for one row per rank of any size.
        ranks: ranks that share the items.

    Returns:
        For each rank its rows, in the order of `first_fit_decreasing`. Only if there are fewer items than rows, ranks
        have different numbers of rows.
    """
    count = ranks if capacity is None else -(-len(first_fit_decreasing(lengths, capacity)) // ranks) * ranks
    while not (rows := _longest_first(work, lengths, count, capacity)):
        count += ranks
    row_work = [sum(work[item] for item in row) for row in rows]
    shares = _longest_first(row_work, [1] * count, ranks, count // ranks)
    return [sorted(sorted(rows[row]) for row in share if rows[row]) for share in shares]


def _longest_first(work: Sequence[int], lengths: Sequence[int], bins: int, capacity: int | None) -> list[list[int]]:
    """Items by bin; no bins if an item has no room. Of equal work the first item goes first, to the first bin."""
    held: list[list[int]] = [[] for _ in range(bins)]
    used = [0] * bins
    least = [(0, at) for at in range(bins)]
    heapify(least)
    for item in sorted(range(len(work)), key=lambda i: -work[i]):
        full = []
        while least and capacity is not None and used[least[0][1]] + lengths[item] > capacity:
            full.append(heappop(least))
        if not least:
            return []
        done, at = heappop(least)
        held[at].append(item)
        used[at] += lengths[item]
        for entry in (*full, (done + work[item], at)):
            heappush(least, entry)
    return held
