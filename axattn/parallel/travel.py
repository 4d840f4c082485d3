"""Layers with a state (Mamba, linear attention, convolutions) when tokens are placed on ranks: the tokens of each
document travel to one rank, the layer runs there on whole documents, and its outputs travel back.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from axattn.documents.boundaries import Segments, total
from axattn.documents.placement import Placement
from axattn.hf.transfers import on_device
from axattn.parallel.collectives import exchange_rows


@dataclass(frozen=True, eq=False)
class Travel:
    """Whole documents on one rank each, and the way there and back.

    Attributes:
        group: of the ranks.
        slots: tokens on every rank.
        segments: the documents of this rank, in one row of N tokens; one token if it has none.
        leaving: int64, this rank's tokens by the rank that they travel to.
        left: how many of them travel to each rank.
        arrived: how many tokens come from each rank.
        order: int64 ``[N]``, the index of each token of the row among those that arrived.
        returning: int64, the tokens of the row that travel back, by rank; a stem (`Segments.stems`) does not.
        returned: how many of them travel to each rank.
        came_back: how many tokens come back from each rank.
        places: int64, the slots of these.
        idle: no document is on several ranks.
    """

    group: Any
    slots: int
    segments: Segments
    leaving: torch.Tensor
    left: list[int]
    arrived: list[int]
    order: torch.Tensor
    returning: torch.Tensor
    returned: list[int]
    came_back: list[int]
    places: torch.Tensor
    idle: bool

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """The whole documents of this rank: ``[1, slots, ...]`` → ``[1, N, ...]``."""
        sent = x[0].index_select(0, self.leaving)
        got = sent if self.idle else exchange_rows(sent, self.left, self.arrived, self.group)
        if not len(self.order):  # the layer runs on every rank: its weights may be sharded
            return torch.cat([got, got.new_zeros(1, *got.shape[1:])])[None]
        return got.index_select(0, self.order)[None]

    def put_back(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of this rank's tokens: ``[1, N, ...]`` → ``[1, slots, ...]``, zero at padding."""
        sent = x[0].index_select(0, self.returning)
        got = sent if self.idle else exchange_rows(sent, self.returned, self.came_back, self.group)
        return got.new_zeros(self.slots, *got.shape[1:]).index_copy(0, self.places, got)[None]


def travel_of(placement: Placement, rank: int, group: Any, device: torch.device) -> Travel:
    """The `Travel` of a forward on one rank.

    A document that one rank holds stays there; others go to the rank with the fewest tokens so far, longest first.
    """
    owner, slot, ranks = placement.owner, placement.slot, placement.ranks
    paths = [_tokens((*one.stem, *one.own)) for one in placement.documents]
    homes = _homes(placement, paths)
    rows, own = [], []
    for there in range(ranks):
        mine = [number for number, home in enumerate(homes) if home == there]
        rows.append(np.concatenate([np.arange(0), *(paths[number] for number in mine)]))
        fronts = [np.arange(len(paths[number])) >= total(placement.documents[number].stem) for number in mine]
        own.append(np.concatenate([np.zeros(0, dtype=bool), *fronts]))
    by_owner = [np.argsort(owner[row], kind="stable") for row in rows]
    arrived = by_owner[rank]
    back = arrived[own[rank][arrived]]
    leaving = [row[owner[row] == rank] for row in rows]
    coming = [row[(owner[row] == rank) & mine] for row, mine in zip(rows, own, strict=True)]
    lengths = [len(paths[number]) for number, home in enumerate(homes) if home == rank]

    def index(x: np.ndarray) -> torch.Tensor:
        return on_device(torch.from_numpy(x), device)

    def counts(tokens: np.ndarray) -> list[int]:
        found: list[int] = np.bincount(owner[tokens], minlength=ranks).tolist()
        return found

    return Travel(
        group=group,
        slots=placement.slots,
        segments=Segments((tuple(accumulate(lengths, initial=0)) if lengths else (0, 1),), device),
        leaving=index(slot[np.concatenate(leaving)]),
        left=list(map(len, leaving)),
        arrived=counts(rows[rank]),
        order=index(np.argsort(arrived)),
        returning=index(back),
        returned=counts(rows[rank][back]),
        came_back=list(map(len, coming)),
        places=index(slot[np.concatenate(coming)]),
        idle=all(bool((owner[row] == there).all()) for there, row in enumerate(rows)),
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


def _tokens(ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
    return np.concatenate([np.arange(a, b) for a, b in ranges])
