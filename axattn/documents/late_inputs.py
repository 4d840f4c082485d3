"""Inputs that come to a model behind its input hook: from a user's forward pre-hook, or a wrapper of ``forward``.

The hook marks a forward before which, or around which, code runs that it does not know. While such a forward runs, its
inputs are read in its own frame, where its masks are made or its first attention module is called.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from axattn.documents.boundaries import Segments
from axattn.documents.forward_context import Context, Seen, slot
from axattn.documents.read_inputs import described, read
from axattn.documents.traced import TracedSegments
from axattn.errors import InvalidInputError, Reason
from axattn.hf.forward_inputs import token_shape
from axattn.hf.source_inspection import inputs_in_frame
from axattn.traits import dynamic_rope


def look(context: Context) -> None:
    """Read the documents in the inputs with which the forward of a context runs. Those that positions tell, where
    nothing told any before, hold from here on.

    Args:
        context: of a forward that is marked (`Context.behind`); this takes the mark off.

    Raises:
        AxattnError: other documents than the model was called with, which do not reach everything that reads them; or
            what `axattn.documents.read_inputs.read` refuses.
    """
    module, context.behind = context.behind, None
    given = inputs_in_frame(module)
    if module is None or given is None:
        return
    facts: Any = context.door.facts  # type: ignore[attr-defined]
    seen = _own(described(given, context.outer), context)
    if all(new is old for new, old in zip(seen, context.seen, strict=True)):
        return
    shape = token_shape(given)
    if shape is None or shape[1] == 1:
        return
    given |= {"position_ids": seen.positions, "attention_mask": seen.mask}
    if context.share is not None or slot().told is not None:
        if not _same(seen, context.seen):
            _refuse(module, seen, context, "rows that are unpadded or split have positions and documents of their own")
        return
    # (Transformers' flash path gets no lengths here: the input hook adds them before)
    found = read(dataclasses.replace(facts, takes_lengths=False), module, given, seen, context.outer)
    if _documents(found.segments) == _documents(context.segments):
        return
    positions_alone = seen._replace(positions=None, mask=None).nothing
    if not positions_alone and seen.positions is not None:  # what else is given says the same
        alone = Seen(positions=seen.positions, mask=seen.mask)
        told = read(dataclasses.replace(facts, takes_lengths=False), module, given, alone, context.outer)
        positions_alone = _documents(told.segments) == _documents(found.segments)
    positions_alone = positions_alone and not found.numbered
    known = context.segments is not None
    late = facts.by_document or any(
        dynamic_rope.longropes(module)
    )  # what runs document by document has run, or may have
    if known or late or (facts.native is None and not positions_alone):
        _refuse(module, seen, context, "they tell other documents than the model was called with")
    if facts.native is None:
        context.segments, context.seen, context.shape = found.segments, seen, found.shape


def _own(seen: Seen, context: Context) -> Seen:
    """What a forward was given, without what it has made of it itself: masks that are finished, planes of positions."""
    positions, mask = seen.positions, seen.mask
    if not (isinstance(positions, torch.Tensor) and positions.ndim == 2 and not positions.is_floating_point()):
        positions = context.seen.positions
    if not (isinstance(mask, torch.Tensor) and mask.ndim == 2) or mask is context.plain:
        mask = context.seen.mask
    return seen._replace(positions=positions, mask=mask)


def _same(seen: Seen, known: Seen) -> bool:
    """Whether inputs say the same as those that are known. None for positions says nothing."""
    for new, old in zip(seen, known, strict=True):
        if new is old or new is None:
            continue
        if old is None or new.shape != old.shape or not torch.equal(new, old):
            return False
    return True


def _documents(segments: Segments | TracedSegments | None) -> Any:
    return segments.boundaries if isinstance(segments, Segments) and segments.packed else None


def _refuse(module: torch.nn.Module, seen: Seen, context: Context, text: str) -> None:
    words = ("position_ids", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
    new = [word for word, x, old in zip(words, seen, context.seen, strict=True) if x is not old]
    raise InvalidInputError(
        f"a hook or a wrapper of {type(module).__name__}.forward gave it {', '.join(new)}",
        [Reason(new[0], text)],
        "Give them to the model itself (or register the hook behind axattn's with prepend=True).",
    )
