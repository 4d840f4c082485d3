"""Image blocks among packed documents: what Transformers lays over a mask token by token, and then looks up elsewhere.

Since 5.18 Transformers hands mask functions the positions within documents. A window counts the same there; an overlay
that looks up which image a token belongs to reads another token's (Gemma 3's sliding layers, transformers 5.23).
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.documents.traced import TracedSegments
from axattn.hf.mask_functions import MaskFunction, closure, known


def blocks_in_place(function: MaskFunction) -> MaskFunction:
    """A mask function whose image blocks are looked up at a token's place in its row, all else as it was.

    Args:
        function: of absolute indices, as Transformers composes it; not inside ``torch.compile``, where nobody can look
            into it.
    """
    return _pushed_down(function, None) if _looks_up(function, False) else function


def require_one_document(segments: TracedSegments) -> None:
    """Assert in a compiled graph that rows under an overlay are not packed."""
    if known().remap is not None:
        segments.require_single("packed rows under an overlay of the mask (image blocks) can't be compiled")


def _looks_up(function: MaskFunction, remapped: bool) -> bool:
    """Whether there are image blocks inside that get positions within documents."""
    k, code = known(), getattr(function, "__code__", None)
    if code is k.blocks:
        return remapped
    if code is k.remap and code is not None:
        return _looks_up(closure(function)["mask_function"], True)
    parts = closure(function)["mask_functions"] if code in (k.and_mask, k.or_mask) else ()
    return any(_looks_up(part, remapped) for part in parts)


def _pushed_down(function: MaskFunction, positions: torch.Tensor | None) -> MaskFunction:
    """The same function with the change of indices (to `positions`, if any) at its leaves that are no image blocks."""
    from transformers import masking_utils as mu

    k, code = known(), getattr(function, "__code__", None)
    if code is k.blocks:
        return function
    if code is k.remap and code is not None:
        inner = closure(function)
        return _pushed_down(inner["mask_function"], inner["position_ids"])
    if code in (k.and_mask, k.or_mask):
        join: Any = mu.and_masks if code is k.and_mask else mu.or_masks
        joined: MaskFunction = join(*(_pushed_down(part, positions) for part in closure(function)["mask_functions"]))
        return joined
    if positions is None:
        return function
    changed: MaskFunction = mu.remap_positions_for_packed_sequence(function, positions)
    return changed
