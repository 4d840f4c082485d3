"""``unpad=True``: a padded batch runs as one packed row of its real tokens through the whole model.

Padding is removed from the model's inputs and put back into its outputs, so every layer runs without it, not only
attention.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn import backends
from axattn.documents.boundaries import Segments
from axattn.documents.forward_context import BoundaryInputs, Context, assume, current, reading
from axattn.documents.inputs import require_axattn_backend
from axattn.documents.peft_row_effects import reasons_by_row
from axattn.documents.read_inputs import documents
from axattn.documents.unpadded_batch import UnpaddedBatch
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.hf.foreign_code import foreign_hooks, takes_gradients_by_row
from axattn.hf.forward_inputs import INPUTS, is_given, tokens_of, unpadded_as
from axattn.hf.forward_outputs import Holds, tensors_of
from axattn.hf.torch_internals import is_tracing
from axattn.patches.forward_wrapper import Forward, add_model_wrappers, wants_cache
from axattn.patches.patchset import PatchSet
from axattn.planning.plan import Plan
from axattn.spec import names
from axattn.spec.notices import logger, warn_once
from axattn.traits import row_forms
from axattn.traits.dynamic_rope import limits, rope_scaling_threshold
from axattn.traits.losses import IGNORE_INDEX, predicts_next, shifted, takes_keywords
from axattn.traits.model_traits import ModelTraits
from axattn.traits.pooling import read_at
from axattn.traits.position_ids import own_positions
from axattn.traits.row_forms import inner_part
from axattn.unpadding.pooler import add_whole_rows


def reasons_against(model: torch.nn.Module, decided: Plan) -> list[Reason]:
    """Every reason why a model's batches can't be unpadded; empty if they can."""
    needs = [entry.layer.need for entry in decided.layers]
    reasons = row_forms.reasons_against(model, "unpadded", needs, tuple(decided.running.values()))
    own = dict.fromkeys(name for name in decided.running.values() if name in names.axattn_backends() and name != "auto")
    return [
        *reasons,
        *(Reason("segments", f"{name} does not pack") for name in own if not backends.get(name).capability.segments),
    ]


def add_unpadding(patches: PatchSet, model: torch.nn.Module, decided: Plan) -> None:
    """Unpad every batch of a model.

    Raises:
        UnsupportedAttentionError: its batches can't be unpadded; with every reason.
    """
    reasons = reasons_against(model, decided)
    if reasons:
        raise UnsupportedAttentionError(f"unpad=True can't serve {type(model).__name__}", reasons, "Leave unpad out.")
    inner = inner_part(model)
    add_whole_rows(patches, inner)
    reads_first = "first" in read_at(model) | read_at(inner)
    change = Unpad(limits(model), rope_scaling_threshold(model), reads_first)
    add_model_wrappers(patches, inner, change, at_head=False)


class Unpad:
    """The change around a model's ``forward``: runs its real tokens as one row, and returns padded rows.

    Args:
        limits: lengths above which its rotary frequencies depend on the longest row (`axattn.traits.dynamic_rope`).
        rope_scaling_threshold: the length above which they change with every length, None for none.
        reads_first: whether a head or a pooler reads the first token of each padded row.
    """

    def __init__(self, limits: list[int], rope_scaling_threshold: int | None, reads_first: bool) -> None:
        self.traits = ModelTraits()
        self.limits = limits
        self.rope_scaling_threshold = rope_scaling_threshold
        self.reads_first = reads_first
        self.hooks_checked = False

    def __call__(self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
        """Run one forward; returns the model's output. Batches run padded if they have no padding, if part of the model
        reads it, if they read a cache or return one that the caller may use, and inside a compiled graph."""
        mask, around = inputs.get("attention_mask"), current()
        if (
            not isinstance(mask, torch.Tensor)
            or mask.ndim != 2
            or (around is not None and around.reads_padding)
            or wants_cache(model, inputs)
            or is_tracing()
        ):
            return forward(inputs)
        tokens = tokens_of(inputs)
        if tokens is None or mask.shape != tokens.shape[:2]:
            return forward(inputs)
        keep = (mask != 0).flatten().nonzero().flatten()  # [N]
        if keep.numel() in (0, mask.numel()) or (self.reads_first and not bool((mask[:, 0] != 0).all())):
            return forward(inputs)
        require_axattn_backend(self.traits, model)
        if batch_reasons := reasons_against_batch(model, inputs):
            text = f"{type(model).__name__} can't run this batch unpadded"
            raise InvalidInputError(text, batch_reasons, "Leave unpad out.")
        if not self.hooks_checked:
            self.hooks_checked = True
            _warn_of_hooks(model)
        rows, length = mask.shape
        unpadded = UnpaddedBatch(keep, rows, length)
        packed = documents(self.traits, model, inputs)
        segments = _flat_documents(packed, keep, rows, length)
        if segments is None:
            return forward(inputs)
        given = unpadded_as(inputs, "copy") | {"use_cache": False, "return_dict": True}
        given |= {key: unpadded.flatten(value) for key, value in unpadded_as(inputs, "cut").items()}
        given["position_ids"] = _positions(model, inputs, mask, unpadded, packed)
        if self.limits and self._rope_differs(inputs, given["position_ids"], segments, rows, length):
            return forward(inputs)
        if inputs.get("labels") is not None:
            given |= _targets(model, inputs, mask, unpadded)
        packed_documents = segments if segments.packed else None
        context = Context(packed_documents, (1, keep.numel()), False, BoundaryInputs(), self, around, unpadded=unpadded)
        with assume(documents=segments), reading(context):  # `reading`: for models without an input hook
            output = forward(given)
        restore_outputs(model, output, unpadded, "unpad")
        return output.to_tuple() if inputs.get("return_dict") is False else output

    def missed(self, context: Context) -> str:
        """See `axattn.patches.forward_wrapper.WholeModel`: batches without padding miss nothing."""
        mask = context.bounds.mask
        padded = isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.all())
        return "this batch would not run unpadded, despite unpad=True" if padded else ""

    def _rope_differs(
        self, inputs: dict[str, Any], positions: torch.Tensor, segments: Segments, rows: int, length: int
    ) -> bool:
        """Whether rotary frequencies would differ from those of the padded batch, which depend on its highest position
        or on its documents."""
        given = inputs.get("position_ids")
        padded = length if given is None else int(given.max()) + 1
        unpadded = int(positions.max()) + 1
        if self.rope_scaling_threshold is not None and self.rope_scaling_threshold < padded != unpadded:
            return True
        return any(limit < padded and (unpadded <= limit or segments.documents != rows) for limit in self.limits)


def _flat_documents(packed: Segments | None, keep: torch.Tensor, rows: int, length: int) -> Segments | None:
    """The documents of the flat row: those of each row, without padding. None for padding inside a document, without
    which a window or chunk would cover more of its tokens."""
    starts = {row * length for row in range(rows)}
    if packed is not None:
        starts |= {row * length + at for row, edges in enumerate(packed.boundaries) for at in edges[:-1]}
    edges = torch.tensor(sorted(starts), device=keep.device)
    member = torch.bucketize(keep, edges, right=True) - 1
    non_contiguous_padding = ((keep[1:] != keep[:-1] + 1) & (member[1:] == member[:-1])).sum()
    inside, *counts = torch.cat([non_contiguous_padding[None], torch.bincount(member, minlength=len(edges))]).tolist()
    if inside:
        return None
    ends = [0]
    for count in counts:
        if count:
            ends.append(ends[-1] + count)
    return Segments((tuple(ends),), keep.device)


def restore_outputs(model: torch.nn.Module, output: Any, unpadded: Any, option: str) -> None:
    """Put every output that has a value per token back into the places of the batch.

    Args:
        model: the model.
        output: of the unpadded row; changed in place.
        unpadded: the row: an `UnpaddedBatch`, or one of its form.
        option: the user's, for errors.

    Raises:
        UnsupportedAttentionError: an output does not have its known shape.
    """
    reasons = []
    for key, holds, value in tensors_of(output):
        if holds is Holds.LAYERS:
            output[key] = tuple(map(unpadded.restore, value))
        elif holds is Holds.ROUTING:
            output[key] = tuple(unpadded.restore_along_rows(x) for x in value)
        elif holds is Holds.TOKENS and unpadded.holds(value):
            output[key] = unpadded.restore(value)
        elif holds is not Holds.WHOLE and not (holds is Holds.ROWS and len(value) == unpadded.rows):
            # (one value per row comes from a pooler, which has read padded rows)
            reasons.append(Reason("model", f"axattn does not know how to pad its output {key}"))
    if reasons:
        text = f"{type(model).__name__} can't run with {option}=True"
        raise UnsupportedAttentionError(text, reasons, f"Leave {option} out.")


def _positions(
    model: torch.nn.Module, inputs: dict[str, Any], mask: torch.Tensor, unpadded: UnpaddedBatch, packed: Segments | None
) -> torch.Tensor:
    """The positions of the padded run: the given ones, else the model's own, restarting in each document (in case the
    input hook has not set them: it was skipped, or the documents were added after it)."""
    given = inputs.get("position_ids")
    rows, length = mask.shape
    if given is None:
        ids = None if packed is None else packed.document_ids.to(mask.device)
        given = own_positions(model, inputs.get("input_ids"), mask, ids)
    return unpadded.flatten(given.reshape(-1, length).expand(rows, length))


def _targets(
    model: torch.nn.Module, inputs: dict[str, Any], mask: torch.Tensor, unpadded: UnpaddedBatch
) -> dict[str, torch.Tensor]:
    """Labels of the flat row: the target of each real token in its own row.

    The targets of padding tokens (the first token after padding on the left) are dropped, with one warning.
    """
    labels = inputs["labels"]
    if not predicts_next(model):
        return {"labels": unpadded.flatten(labels)}
    wanted = shifted(labels) if inputs.get("shift_labels") is None else inputs["shift_labels"]
    lost = int(((wanted != IGNORE_INDEX) & (mask == 0)).sum())
    if lost:
        warn_once(f"unpad=True leaves out {lost} targets that padding would have predicted", "lost targets")
    targets = unpadded.flatten(wanted)
    if takes_keywords(model):
        return {"labels": unpadded.flatten(labels), "shift_labels": targets}
    before = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=IGNORE_INDEX)  # the model's own shift undoes this
    return {"labels": before}


def _warn_of_hooks(model: torch.nn.Module) -> None:
    """Warn about hooks on inner modules, which may take dim 0 for samples."""
    hooked = foreign_hooks(model)
    if hooked:
        some = hooked[0] if len(hooked) == 1 else f"{hooked[0]} and {len(hooked) - 1} more"
        logger.warning(
            "axattn: unpad=True runs a batch as one row of real tokens: hooks on %s see [1, N, ...], not [B, S, ...]",
            some,
        )


def reasons_against_batch(model: torch.nn.Module, inputs: dict[str, Any]) -> list[Reason]:
    """Every reason why this batch can't run as one row."""
    reasons = [
        Reason(key, f"{key}: axattn does not know how to unpad it")
        for key, value in inputs.items()
        if (key not in INPUTS or INPUTS[key].unpads == "refuse") and is_given(value)
    ]
    reasons += reasons_by_row(model)
    if takes_gradients_by_row(model):
        text = (
            "Opacus takes a gradient for each index of dim 0: one for the whole batch, clipped as if it were a sample"
        )
        reasons.append(Reason("gradient", text))
    if inputs.get("output_attentions"):
        reasons.append(Reason("weights", "output_attentions=True (the weights would be those of the flat row)"))
    keep = inputs.get("logits_to_keep")
    if isinstance(keep, torch.Tensor) or keep:
        reasons.append(Reason("logits_to_keep", "logits_to_keep counts tokens of padded rows"))
    positions = inputs.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.ndim > 2:
        reasons.append(Reason("position_ids", f"position_ids of shape {list(positions.shape)}"))
    return reasons
