"""Documents that begin alike, for rows in which `share_prefixes=True` runs each beginning once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

SHORTEST = 16
"""A shorter common beginning (a BOS token, the opening of a chat template) is not shared: gathering keys costs more."""


def prefix_groups(documents: Sequence[Sequence[int]], capacity: int) -> list[list[int]]:
    """Documents in groups that fit into a row; those of a group begin alike, each with the next in sorted order.

    Args:
        documents: token ids of each, none longer than `capacity`.
        capacity: tokens in a row.

    Returns:
        Document ids by group. A group that does not fit is cut in several.
    """
    groups: list[list[int]] = []
    size = 0
    for number in sorted(range(len(documents)), key=lambda i: list(documents[i])):
        document = documents[number]
        alike = bool(groups) and common(documents[groups[-1][-1]], document) >= SHORTEST
        if alike and size + len(document) <= capacity:
            groups[-1].append(number)
            size += len(document)
        else:
            groups.append([number])
            size = len(document)
    return groups


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two documents begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
