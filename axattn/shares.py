"""A rank's share of rows that are split over several ranks: `Share`, and `ShareMask`, the mask of such rows.

Value types that the door, the mask function and the interface know; the collectives live in `axattn.parallel`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from axattn.errors import Reason, UnsupportedAttentionError
from axattn.masks import LazyMask
from axattn.segments import Segments


@dataclass(frozen=True, eq=False)
class Share:
    """One forward of B rows of S tokens split over P ranks, S / P consecutive tokens each.

    Attributes:
        group: the ``torch.distributed`` process group of the P ranks.
        ranks: P.
        rank: this one, from 0.
        rows: B.
        length: S, padding to a multiple of P included.
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
