"""Layers with a state (Mamba, linear attention, convolutions) when tokens are placed on ranks: the tokens of each
document travel to one rank, the layer runs there on whole documents, and its outputs travel back.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from axattn.documents.boundaries import Ranges, Segments, total
from axattn.documents.placement import Placement
from axattn.parallel.redistribution import Redistribution, redistribution


@dataclass(frozen=True, eq=False)
class Travel:
    """Whole documents on one rank each, and the way there and back.

    Attributes:
        segments: the documents of this rank, in one row of N tokens; one token if it has none.
        there: from the slots of the ranks to the rows of documents.
        back: from the rows to the slots.
    """

    segments: Segments
    there: Redistribution
    back: Redistribution

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """The whole documents of this rank: ``[1, slots, ...]`` → ``[1, N, ...]``."""
        got = self.there.run(x[0])
        if len(got):
            return got[None]
        # the layer runs on every rank: its weights may be sharded
        return torch.cat([got, got.new_zeros(1, *got.shape[1:])])[None]

    def put_back(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of this rank's tokens: ``[1, N, ...]`` → ``[1, slots, ...]``, zero at padding."""
        return self.back.run(x[0])[None]


def travel_of(placement: Placement, rank: int, group: Any, device: torch.device) -> Travel:
    """The `Travel` of a forward on one rank.

    A document that one rank holds stays there; others go to the rank with the fewest tokens so far, longest first. The
    stem of a document (`Segments.stems`) travels with it, once for each document that goes on from it.
    """
    documents = placement.documents
    paths = [_tokens((*one.stem, *one.own)) for one in documents]
    homes = _homes(placement, paths)
    at_home = [[number for number, home in enumerate(homes) if home == there] for there in range(placement.ranks)]
    rows = [np.concatenate([np.arange(0), *(paths[number] for number in mine)]) for mine in at_home]
    where = np.full(placement.tokens, -1)  # of each token, among the tokens of all rows
    home, place = np.repeat(np.arange(len(rows)), list(map(len, rows))), np.concatenate(list(map(_counted, rows)))
    at = 0
    for number in (number for mine in at_home for number in mine):
        front, end = total(documents[number].stem), len(paths[number])
        where[paths[number][front:]] = np.arange(at + front, at + end)
        at += end
    back = [np.full(placement.slots, -1) for _ in rows]
    for there, found in enumerate(back):
        held = placement.held(there)
        found[: len(held)] = where[held]
    lengths = [len(paths[number]) for number in at_home[rank]]
    return Travel(
        Segments((tuple(accumulate(lengths, initial=0)) if lengths else (0, 1),), device),
        redistribution(rows, placement.owner, placement.slot, rank, group, device),
        redistribution(back, home, place, rank, group, device),
    )


def _homes(placement: Placement, paths: list[np.ndarray]) -> list[int]:
    """The rank of each document."""
    owners = [np.unique(placement.owner[path]) for path in paths]
    homes = [int(one[0]) if len(one) == 1 else -1 for one in owners]
    load = [sum(len(paths[at]) for at, home in enumerate(homes) if home == rank) for rank in range(placement.ranks)]
    for number in sorted((at for at, home in enumerate(homes) if home < 0), key=lambda at: -len(paths[at])):
        homes[number] = load.index(min(load))
        load[homes[number]] += len(paths[number])
    return homes


def _tokens(ranges: Ranges) -> np.ndarray:
    return np.concatenate([np.arange(a, b) for a, b in ranges])


def _counted(row: np.ndarray) -> np.ndarray:
    return np.arange(len(row))
