"""`SequenceShard`: one rank's shard of rows split over several ranks. The collectives live in `axattn.parallel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from axattn.documents.boundaries import Segments


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """One forward of B rows of S tokens split over P ranks, S / P consecutive tokens each.

    Attributes:
        group: the ``torch.distributed`` process group of the P ranks.
        ranks: P.
        rank: the index of this rank, from 0.
        rows: B.
        length: S, including padding to a multiple of P.
        segments: the documents of the whole rows, None when every row is one.
        padding: bool ``[B, S]`` (True: a real key) of the whole rows, or None.
    """

    group: Any
    ranks: int
    rank: int
    rows: int
    length: int
    segments: Segments | None
    padding: torch.Tensor | None

    @property
    def part(self) -> int:
        """S / P: tokens of a row on this rank."""
        return self.length // self.ranks
