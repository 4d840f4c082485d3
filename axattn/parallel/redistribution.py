"""`Redistribution`: rows of tensors that ranks hold go to the ranks that want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from axattn.hf.transfers import on_device
from axattn.parallel.collectives import exchange_rows


@dataclass(frozen=True, eq=False)
class Redistribution:
    """What one rank sends and gets. A row may go to several ranks, and several times to one; gradients are summed.

    Attributes:
        group: the process group.
        leaving: int64, the rows that leave, by the rank that they go to.
        left: how many go to each rank.
        arrived: how many come from each rank.
        places: int64, where those that come belong in the result; None if in their order.
        size: rows of the result; those that nobody sends are zero.
        idle: every rank only gets rows of its own.
    """

    group: Any
    leaving: torch.Tensor
    left: list[int]
    arrived: list[int]
    places: torch.Tensor | None
    size: int
    idle: bool

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, ...]`` → ``[size, ...]``."""
        sent = x.index_select(0, self.leaving)
        got = sent if self.idle else exchange_rows(sent, self.left, self.arrived, self.group)
        if self.places is None:
            return got
        return got.new_zeros(self.size, *got.shape[1:]).index_copy(0, self.places, got)


def redistribution(
    wanted: Sequence[np.ndarray], owner: np.ndarray, slot: np.ndarray, rank: int, group: Any, device: torch.device
) -> Redistribution:
    """The `Redistribution` of one rank.

    Args:
        wanted: int64, for each rank the rows that it wants, in the order of its result; -1 for zeros.
        owner: ``[rows of all ranks]``, the rank that holds each row.
        slot: its index among the rows of that rank.
        rank: this one.
        group: the process group.
        device: of the tensors.
    """
    real = [rows[rows >= 0] for rows in wanted]
    leaving = [rows[owner[rows] == rank] for rows in real]
    mine = np.flatnonzero(wanted[rank] >= 0)
    holders = owner[wanted[rank][mine]]
    places = mine[np.argsort(holders, kind="stable")]
    size = len(wanted[rank])
    in_order = len(places) == size and bool((places == np.arange(size)).all())
    return Redistribution(
        group,
        on_device(torch.from_numpy(slot[np.concatenate(leaving)]), device),
        list(map(len, leaving)),
        np.bincount(holders, minlength=len(wanted)).tolist(),
        None if in_order else on_device(torch.from_numpy(places), device),
        size,
        all(bool((owner[rows] == number).all()) for number, rows in enumerate(real)),
    )
