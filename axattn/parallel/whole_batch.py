"""`Batch`: what every rank of a group is given. `WholeBatch`: lets a change inside a model run other tokens of it than
those that the ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from axattn.documents.boundaries import Segments
from axattn.documents.placement import Document, Placement, place
from axattn.documents.sequence_shard import SequenceShard
from axattn.hf.transfers import on_device
from axattn.parallel.redistribution import Redistribution, redistribution
from axattn.parallel.travel import travel_of


@dataclass(frozen=True, eq=False)
class OtherTokens:
    """A forward over other tokens than those that the ranks hold.

    Attributes:
        shard: this rank's.
        inputs: this rank's, of those with a value per token.
        way: from the outputs of the ranks to the places of the tokens that they hold.
    """

    shard: SequenceShard
    inputs: dict[str, torch.Tensor]
    way: Redistribution

    @property
    def rows(self) -> int:
        """Rows of the forward."""
        return 1

    def holds(self, x: torch.Tensor) -> bool:
        """Whether `x` has one value per token of this rank, ``[1, slots, ...]``."""
        return x.shape[:2] == (1, self.shard.part)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """An output of this forward at the tokens that the rank holds, zeros for padding."""
        return self.way.run(x[0])[None]

    def restore_along_rows(self, x: torch.Tensor) -> torch.Tensor:
        """``[slots, ...]`` as by `restore`."""
        return self.way.run(x)


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch that every rank of a group holds whole.

    Attributes:
        rows: B.
        length: S.
        segments: its documents, None when every row is one.
        mask: ``[B, S]``, nonzero for real tokens, or None.
        per_token: inputs with a value for each token, ``[B or 1, S, ...]``: among them ``position_ids``, and targets
            shifted before the split, so that none is lost between two ranks.
        settings: inputs that every rank gets as they are.
        device: of its tokens.
    """

    rows: int
    length: int
    segments: Segments | None
    mask: torch.Tensor | None
    per_token: dict[str, torch.Tensor]
    settings: dict[str, Any]
    device: torch.device

    @cached_property
    def mask_on_host(self) -> torch.Tensor | None:
        """bool ``[B, S]`` on the CPU, None without padding; the one transfer to the host."""
        found = None if self.mask is None else (self.mask != 0).cpu()
        return None if found is None or bool(found.all()) else found


@dataclass(frozen=True, eq=False)
class WholeBatch:
    """The batch of a forward whose tokens are placed on ranks.

    Attributes:
        batch: the batch.
        placement: of its tokens.
        rank: this rank.
        group: of the ranks.
        travels: the model has layers with a state.
    """

    batch: Batch
    placement: Placement
    rank: int
    group: Any
    travels: bool

    def other_tokens(
        self, documents: Sequence[Document], tokens: np.ndarray, source: np.ndarray, inputs: dict[str, torch.Tensor]
    ) -> OtherTokens:
        """A forward over M of the batch's tokens, placed on the same ranks.

        Args:
            documents: of the M tokens, which are counted from 0.
            tokens: int64 ``[M]``, their flat indices in the batch.
            source: int64 ``[B * S]``, which of the M stands for each token of the batch, -1 for none.
            inputs: with a value per token, ``[B or 1, S, ...]``.
        """
        placed = place(documents, len(tokens), self.placement.ranks)
        device = next(iter(inputs.values())).device
        held = on_device(torch.from_numpy(tokens[placed.held(self.rank)]), device)
        given = {}
        for key, value in inputs.items():
            flat = value.expand(self.batch.rows, *value.shape[1:]).flatten(0, 1).index_select(0, held)
            given[key] = torch.cat([flat, flat.new_zeros(placed.slots - len(held), *flat.shape[1:])])[None]
        travel = travel_of(placed, self.rank, self.group, device) if self.travels else None
        shard = SequenceShard(None, 1, 0, 1, placed.slots, None, None, placed, self.group, self.rank, travel)
        wanted = list(self._at_tokens(source))
        return OtherTokens(
            shard, given, redistribution(wanted, placed.owner, placed.slot, self.rank, self.group, device)
        )

    def _at_tokens(self, source: np.ndarray) -> Iterable[np.ndarray]:
        """For each rank the values of `source` at the tokens that it holds, -1 at padding."""
        for rank in range(self.placement.ranks):
            found = np.full(self.placement.slots, -1)
            held = self.placement.held(rank)
            found[: len(held)] = source[held]
            yield found
