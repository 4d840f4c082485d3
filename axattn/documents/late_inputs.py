"""Inputs that change after a model's input hook has run: by a user's forward pre-hook, or a wrapper of ``forward``.

The input hook marks a forward if unknown code runs between the two. The inputs of such a forward are read again in its
own frame when its masks are made or its first attention module is called.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from axattn.documents.boundaries import Segments
from axattn.documents.forward_context import BoundaryInputs, Context, slot
from axattn.documents.read_inputs import boundary_inputs, read
from axattn.documents.traced import TracedSegments
from axattn.errors import InvalidInputError, Reason
from axattn.hf.forward_inputs import token_shape
from axattn.hf.source_inspection import inputs_in_frame
from axattn.traits import dynamic_rope


def recheck_inputs(context: Context) -> None:
    """Read the documents again, in the inputs with which the forward of a context runs. Documents that only positions
    describe are accepted if the model was called with none.

    Args:
        context: of a marked forward (`Context.recheck`); this removes the mark.

    Raises:
        AxattnError: other documents than the model was called with, which would not reach all layers; or inputs that
            `axattn.documents.read_inputs.read` refuses.
    """
    module, context.recheck = context.recheck, None
    given = inputs_in_frame(module)
    if module is None or given is None:
        return
    traits: Any = context.hook.traits  # type: ignore[attr-defined]
    bounds = _inputs_as_given(boundary_inputs(given, context.outer), context)
    if all(new is old for new, old in zip(bounds, context.bounds, strict=True)):
        return
    shape = token_shape(given)
    if shape is None or shape[1] == 1:
        return
    given |= {"position_ids": bounds.positions, "attention_mask": bounds.mask}
    if context.shard is not None or slot().known_documents is not None:
        if not _equal_inputs(bounds, context.bounds):
            _refuse(module, bounds, context, "unpadded or split rows already have their own positions and documents")
        return
    # Transformers' flash path gets no lengths here: only the input hook adds them
    found = read(dataclasses.replace(traits, takes_lengths=False), module, given, bounds, context.outer)
    if _documents(found.segments) == _documents(context.segments):
        return
    positions_alone = bounds._replace(positions=None, mask=None).nothing
    if not positions_alone and bounds.positions is not None:  # the other inputs may describe the same documents
        alone = BoundaryInputs(positions=bounds.positions, mask=bounds.mask)
        reread = read(dataclasses.replace(traits, takes_lengths=False), module, given, alone, context.outer)
        positions_alone = _documents(reread.segments) == _documents(found.segments)
    positions_alone = positions_alone and not found.has_document_ids
    known = context.segments is not None
    # layers that run document by document may have run already
    late = traits.by_document or any(dynamic_rope.longropes(module))
    if known or late or (traits.native is None and not positions_alone):
        _refuse(module, bounds, context, "they describe other documents than the model was called with")
    if traits.native is None:
        context.segments, context.bounds, context.shape = found.segments, bounds, found.shape


def _inputs_as_given(bounds: BoundaryInputs, context: Context) -> BoundaryInputs:
    """The inputs that a forward was given, without those that it made itself: finished masks, planes of positions."""
    positions, mask = bounds.positions, bounds.mask
    if not (isinstance(positions, torch.Tensor) and positions.ndim == 2 and not positions.is_floating_point()):
        positions = context.bounds.positions
    if not (isinstance(mask, torch.Tensor) and mask.ndim == 2) or mask is context.zero_one_mask:
        mask = context.bounds.mask
    return bounds._replace(positions=positions, mask=mask)


def _equal_inputs(bounds: BoundaryInputs, known: BoundaryInputs) -> bool:
    """Whether inputs equal the known ones; None matches anything."""
    for new, old in zip(bounds, known, strict=True):
        if new is old or new is None:
            continue
        if old is None or new.shape != old.shape or not torch.equal(new, old):
            return False
    return True


def _documents(segments: Segments | TracedSegments | None) -> Any:
    return segments.boundaries if isinstance(segments, Segments) and segments.packed else None


def _refuse(module: torch.nn.Module, bounds: BoundaryInputs, context: Context, text: str) -> None:
    words = ("position_ids", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
    new = [word for word, x, old in zip(words, bounds, context.bounds, strict=True) if x is not old]
    raise InvalidInputError(
        f"a hook or a wrapper of {type(module).__name__}.forward gave it {', '.join(new)}",
        [Reason(new[0], text)],
        "Pass them to the model itself (or register the hook with prepend=True, to run before axattn's).",
    )
