"""`ShareMask`: the mask of rows that are split over several ranks."""

from __future__ import annotations

import dataclasses

import torch

from axattn.documents.sequence_shard import Share
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.masks.lazy_mask import LazyMask


class ShareMask(LazyMask):
    """Stands for the mask in a model that sees its share of the rows; `whole` is the mask of the whole rows.

    It passes through a model like any `LazyMask`, but has no dense form: its queries are on one rank, its keys on all.
    """

    __slots__ = ("share", "whole_rows")

    def __init__(self, share: Share, whole_rows: LazyMask) -> None:
        super().__init__(
            shape=(share.rows, 1, share.part, share.part),
            pattern=None,
            segments=None,
            padding=None,
            materialise=_no_dense_form,
            device=whole_rows.device,
            guarded=True,
        )
        self.share = share
        self.whole_rows = whole_rows

    def _on(self, device: torch.device) -> ShareMask:
        padding = None if self.share.padding is None else self.share.padding.to(device)
        return ShareMask(dataclasses.replace(self.share, padding=padding), self.whole_rows.on(device))


def _no_dense_form() -> torch.Tensor:
    raise UnsupportedAttentionError(
        "this model can't run sequence-parallel",
        [Reason("dense_mask", "its code reads the values of the attention mask, and a rank holds only its own tokens")],
        "Run it without axattn.sequence_parallel.",
    )
