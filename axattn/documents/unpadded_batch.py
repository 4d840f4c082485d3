"""`UnpaddedBatch`: maps the tokens of an unpadded row to its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class UnpaddedBatch:
    """A padded batch as one row: without its padding, and with `places` without the tokens that others stand for.

    Attributes:
        keep: int64 ``[N]``, the flat indices of its tokens in the padded batch ``[B * S]``.
        rows: B of the batch.
        length: S of the batch.
        places: int64 ``[M]``, the flat indices of all real tokens of a batch that shares prefixes, else None.
        source: int64 ``[M]``, the index in the row of each of them.
    """

    keep: torch.Tensor
    rows: int
    length: int
    places: torch.Tensor | None = None
    source: torch.Tensor | None = None

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, S, ...]`` → ``[1, N, ...]``."""
        return x.flatten(0, 1).index_select(0, self.keep)[None]

    def holds(self, x: torch.Tensor) -> bool:
        """Whether `x` has one value per token of the unpadded row, ``[1, N, ...]``."""
        return x.shape[:2] == (1, self.keep.numel())

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, N, ...]`` → ``[B, S, ...]``, zeros for padding."""
        whole = x.new_zeros(self.rows * self.length, *x.shape[2:])
        if self.places is not None and self.source is not None:
            values = x[0].index_select(0, self.source)
            return whole.index_copy(0, self.places, values).view(self.rows, self.length, *x.shape[2:])
        return whole.index_copy(0, self.keep, x[0]).view(self.rows, self.length, *x.shape[2:])

    def restore_along_rows(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, ...]`` → ``[B * S, ...]``, zeros for padding; tensors of other lengths are returned unchanged."""
        if self.holds(x):
            return self.restore(x)
        if x.shape[0] != self.keep.numel():
            return x
        return self.restore(x[None]).flatten(0, 1)
