"""Masks of rows that are split over several ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from axattn.documents.sequence_shard import SequenceShard
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.mask_functions import Pattern
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.varlen_layout import Layout


class ShardMask(LazyMask):
    """The mask in a model that runs one shard of the rows; `whole_rows` is the mask of the whole rows.

    It passes through a model like any `LazyMask`, but has no dense form: its queries are on one rank, its keys on all.
    """

    __slots__ = ("shard", "whole_rows")

    def __init__(self, shard: SequenceShard, whole_rows: LazyMask) -> None:
        super().__init__(**_passed_through(shard, shard.part, whole_rows.device))
        self.shard = shard
        self.whole_rows = whole_rows

    def _on(self, device: torch.device) -> ShardMask:
        return ShardMask(_shard_on(self.shard, device), self.whole_rows.on(device))


class PlacedMask(LazyMask):
    """The mask in a model whose tokens are placed on ranks by document (`SequenceShard.placement`).

    Like a `ShardMask` it has no dense form; `axattn.parallel.fetch` makes that of a rank's queries and the keys that
    they see.
    """

    __slots__ = ("rule", "shard")

    def __init__(self, shard: SequenceShard, rule: Pattern, device: torch.device) -> None:
        super().__init__(**_passed_through(shard, shard.length, device))
        self.shard = shard
        self.rule = rule

    def _on(self, device: torch.device) -> PlacedMask:
        return PlacedMask(self.shard, self.rule, device)


class LayoutMask(LazyMask):
    """The mask of packed documents that a layout describes: its keys need not be the tokens of its queries."""

    __slots__ = ()

    def __init__(self, layout: Layout, device: torch.device) -> None:
        super().__init__(
            shape=(layout.rows, 1, layout.q_length, layout.kv_length),
            pattern=Pattern(causal=layout.causal, window=layout.window),
            segments=None,
            padding=None,
            materialise=lambda: layout.dense(device),
            device=device,
            guarded=True,
        )
        self._layout = layout

    def _read_flag(self) -> str | None:
        return None

    def _read_signature(self, spans: bool) -> tuple[Any, ...]:
        causal, window, chunk, dense, padding, _, _, unknown = super()._read_signature(spans)
        layout = self.layout()
        return (causal, window, chunk, dense, padding, True, layout is not None and bool(layout.stems), unknown)

    def _on(self, device: torch.device) -> LayoutMask:
        layout = self.layout()
        if layout is None:
            raise AssertionError("made with a layout")
        return LayoutMask(dataclasses.replace(layout, memo={}), device)


def _passed_through(shard: SequenceShard, tokens: int, device: torch.device) -> dict[str, Any]:
    """The arguments of a `LazyMask` that only names a shard."""
    return {
        "shape": (shard.rows, 1, tokens, tokens),
        "pattern": None,
        "segments": None,
        "padding": None,
        "materialise": _no_dense_form,
        "device": device,
        "guarded": True,
    }


def _shard_on(shard: SequenceShard, device: torch.device) -> SequenceShard:
    return dataclasses.replace(shard, padding=None if shard.padding is None else shard.padding.to(device))


def _no_dense_form() -> torch.Tensor:
    raise UnsupportedAttentionError(
        "this model can't run sequence-parallel",
        [Reason("dense_mask", "its code reads the values of the attention mask, and a rank holds only its own tokens")],
        "Run it without axattn.sequence_parallel.",
    )
