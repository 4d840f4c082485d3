"""Image block masks in packed rows: corrects the indices at which Transformers looks up the image of a token.

Since 5.18 Transformers calls mask functions with positions within documents. Windows are right with these; an image
block mask, which looks up the image of each token, reads the wrong token (Gemma 3's sliding layers, transformers 5.23).
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.documents.traced import TracedSegments
from axattn.hf.mask_functions import MaskFunction, closure, known


def blocks_in_place(function: MaskFunction) -> MaskFunction:
    """The same mask function, but with image blocks looked up at a token's index in its row.

    Args:
        function: over absolute indices, as Transformers composes it; not inside ``torch.compile``, where closures can't
            be read.
    """
    return _remap_other_leaves(function, None) if _has_remapped_blocks(function, False) else function


def require_one_document(segments: TracedSegments) -> None:
    """Assert in a compiled graph that rows with an image block mask are not packed."""
    if known().remap is not None:
        segments.require_single("packed rows under an overlay of the mask (image blocks) can't be compiled")


def _has_remapped_blocks(function: MaskFunction, remapped: bool) -> bool:
    """Whether the function contains image blocks that get positions within documents."""
    k, code = known(), getattr(function, "__code__", None)
    if code is k.blocks:
        return remapped
    if code is k.remap and code is not None:
        return _has_remapped_blocks(closure(function)["mask_function"], True)
    parts = closure(function)["mask_functions"] if code in (k.and_mask, k.or_mask) else ()
    return any(_has_remapped_blocks(part, remapped) for part in parts)


def _remap_other_leaves(function: MaskFunction, positions: torch.Tensor | None) -> MaskFunction:
    """The same function with indices remapped (to `positions`, if any) only in leaves that are not image blocks."""
    from transformers import masking_utils as mu

    k, code = known(), getattr(function, "__code__", None)
    if code is k.blocks:
        return function
    if code is k.remap and code is not None:
        inner = closure(function)
        return _remap_other_leaves(inner["mask_function"], inner["position_ids"])
    if code in (k.and_mask, k.or_mask):
        join: Any = mu.and_masks if code is k.and_mask else mu.or_masks
        joined: MaskFunction = join(
            *(_remap_other_leaves(part, positions) for part in closure(function)["mask_functions"])
        )
        return joined
    if positions is None:
        return function
    changed: MaskFunction = mu.remap_positions_for_packed_sequence(function, positions)
    return changed
