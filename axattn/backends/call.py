"""`AttentionCall`: the normalised form in which every backend gets an attention call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from axattn.masks.dense_rule import dense_rule
from axattn.masks.lazy_mask import LazyMask


def sink_column(sinks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sinks ``[H]`` (gpt-oss) or ``[B, H, S, 1]`` (per token: Inkling 2) as logits ``[1 or B, H, 1 or S, 1]``."""
    return (sinks[None, :, None, None] if sinks.ndim == 1 else sinks).to(dtype)


@dataclass(slots=True, eq=False)
class AttentionCall:
    """One call of an attention module, without Transformers' conventions.

    Attributes:
        module: the calling attention module.
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, Dv]``.
        mask: a `LazyMask`, a user's 4-D tensor (bool: True attends; float: added to the logits), or None.
        causal: without a mask, a query attends to no later key (S equals T); ignored under a mask.
        window: without a mask, keys attended to on the left, the query's own included; ignored under a mask.
        scale: factor on the logits.
        dropout: probability of attention dropout.
        softcap: see `Need.softcap`.
        sinks: ``[H]`` learned sinks, or None.
        bias: additive position bias ``[1 or B, H, S, T]``, or None.
        extras: further keywords for the model's own eager function.
        options: the user's ``kernel_options``.
        want_weights: the caller asks for the attention weights (`Need.weights`).
        weights: set by a kernel that returns them, ``[B, H, S, T]``.
        ran: if a backend passes the call on, the name of the backend whose kernel ran; else ``""``.
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: LazyMask | torch.Tensor | None
    causal: bool
    window: int | None
    scale: float
    dropout: float
    softcap: float | None
    sinks: torch.Tensor | None
    bias: torch.Tensor | None
    extras: dict[str, object]
    options: Mapping[str, Any] = field(default_factory=dict)
    want_weights: bool = False
    weights: torch.Tensor | None = None
    ran: str = ""

    def dense_mask(self) -> torch.Tensor | None:
        """The mask as a tensor ``[B or 1, 1 or H, S, T]``, bool or additive float; None for unmasked attention.

        Without a mask the causal rule is the lower triangle.
        """
        if isinstance(self.mask, LazyMask):
            return self.mask.dense()
        if self.mask is not None or not self.causal:
            return self.mask
        size = self.query.shape[2]
        return dense_rule(size, size, causal=True, window=self.window, device=self.query.device)
