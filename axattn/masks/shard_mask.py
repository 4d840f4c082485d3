"""`ShardMask`: the mask of rows that are split over several ranks."""

from __future__ import annotations

import dataclasses

import torch

from axattn.documents.sequence_shard import SequenceShard
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.masks.lazy_mask import LazyMask


class ShardMask(LazyMask):
    """The mask in a model that runs one shard of the rows; `whole_rows` is the mask of the whole rows.

    It passes through a model like any `LazyMask`, but has no dense form: its queries are on one rank, its keys on all.
    """

    __slots__ = ("shard", "whole_rows")

    def __init__(self, shard: SequenceShard, whole_rows: LazyMask) -> None:
        super().__init__(
            shape=(shard.rows, 1, shard.part, shard.part),
            pattern=None,
            segments=None,
            padding=None,
            materialise=_no_dense_form,
            device=whole_rows.device,
            guarded=True,
        )
        self.shard = shard
        self.whole_rows = whole_rows

    def _on(self, device: torch.device) -> ShardMask:
        padding = None if self.shard.padding is None else self.shard.padding.to(device)
        return ShardMask(dataclasses.replace(self.shard, padding=padding), self.whole_rows.on(device))


def _no_dense_form() -> torch.Tensor:
    raise UnsupportedAttentionError(
        "this model can't run sequence-parallel",
        [Reason("dense_mask", "its code reads the values of the attention mask, and a rank holds only its own tokens")],
        "Run it without axattn.sequence_parallel.",
    )
