"""`SequenceShard`: one rank's shard of rows split over several ranks. The collectives live in `axattn.parallel`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from axattn.documents.boundaries import Segments
from axattn.documents.placement import Placement


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """One rank's tokens of a batch of B rows of S tokens.

    Rows are split into S / P consecutive tokens for each rank, or the batch's tokens are placed on ranks by document;
    on a two-dimensional mesh both: tokens are placed on groups of ranks, and split within each group.

    Attributes:
        group: the ``torch.distributed`` process group of the P ranks that split rows.
        ranks: P; 1 if tokens are only placed.
        rank: the index of this rank, from 0.
        rows: B; 1 if tokens are placed.
        length: S, including padding to a multiple of P; with a placement its `slots`.
        segments: the documents of the whole rows, None when every row is one, or with a placement.
        padding: bool ``[B, S]`` (True: a real key) of the whole rows, or None.
        placement: of the batch's tokens, None if rows are split only.
        fetch_group: the process group of the ranks that tokens are placed on.
        fetch_rank: this rank's index among them.
        travel: brings the documents of placed tokens whole to one rank each (`axattn.parallel.travel.Travel`), for
            layers with a state; None for models without any.
        batch: the whole batch of placed tokens (`axattn.parallel.whole_batch.WholeBatch`), for an inner model that runs
            other tokens of it; else None.
        memo: values derived from the placement once for all layers of a forward.
    """

    group: Any
    ranks: int
    rank: int
    rows: int
    length: int
    segments: Segments | None
    padding: torch.Tensor | None
    placement: Placement | None = None
    fetch_group: Any = None
    fetch_rank: int = 0
    travel: Any = None
    batch: Any = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def part(self) -> int:
        """S / P: tokens of a row on this rank."""
        return self.length // self.ranks
