"""``share_prefixes=True``: what several documents of a batch begin with runs once.

Prompts come several times in a batch: with each completion of a group (GRPO), with both answers of a pair (DPO), with
every choice of a question. The change is around the model's backbone, whose output is put back in the places of the
batch: heads, losses and logits are those of the batch as it came.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from axattn import backends
from axattn.documents.boundaries import Segments
from axattn.documents.forward_context import BoundaryInputs, Context, assume, current, reading, slot
from axattn.documents.inputs import require_axattn_backend
from axattn.documents.placement import Document
from axattn.documents.read_inputs import documents
from axattn.documents.unpadded_batch import UnpaddedBatch
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.forward_inputs import TARGETS, unpadded_as
from axattn.hf.module_walk import modules_of
from axattn.hf.source_inspection import signature_of
from axattn.hf.torch_internals import is_compiled, is_tracing
from axattn.hf.transfers import on_device
from axattn.patches.forward_wrapper import Forward, add_model_wrappers, wants_cache
from axattn.patches.patchset import PatchSet
from axattn.planning.plan import Plan
from axattn.spec.notices import warn_once
from axattn.traits import row_forms
from axattn.traits.dynamic_rope import limits, rope_scaling_threshold
from axattn.traits.model_traits import ModelTraits
from axattn.traits.position_ids import own_positions
from axattn.traits.randomness import random_parts
from axattn.unpadding.prefixes import SharedRow, shared_row
from axattn.unpadding.unpadded_forward import reasons_against_batch, restore_outputs

if TYPE_CHECKING:
    import numpy as np


def reasons_against(model: torch.nn.Module, decided: Plan) -> list[Reason]:
    """Every reason why the batches of a model can't share prefixes; empty if they can."""
    needs = [entry.layer.need for entry in decided.layers]
    reasons = row_forms.reasons_against(model, "shared", needs, tuple(decided.running.values()))
    chosen = dict.fromkeys(entry.chosen for entry in decided.layers)
    if backbone_of(model) is None:
        reasons.append(Reason("model", f"{type(model).__name__} has no backbone apart from its loss"))
    lacking = [name for name in chosen if not backends.get(name).capability_on(decided.environment).stems]
    return [*reasons, *(Reason("stems", f"{name} has no documents that go on from others") for name in lacking)]


def backbone_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The outermost ``PreTrainedModel`` inside a model, itself included, that computes no loss; None if there is none.
    (``base_model`` is the model itself for Llama 4 without images.)"""
    from transformers import PreTrainedModel

    found = (one for one in modules_of(model) if isinstance(one, PreTrainedModel))
    return next((one for one in found if "labels" not in signature_of(one).parameters), None)


def add_shared_prefixes(patches: PatchSet, model: torch.nn.Module, decided: Plan) -> None:
    """Share the prefixes of every batch of a model.

    Raises:
        UnsupportedAttentionError: its batches can't share prefixes; with every reason.
    """
    reasons = reasons_against(model, decided)
    if reasons:
        text = f"share_prefixes=True can't serve {type(model).__name__}"
        raise UnsupportedAttentionError(text, list(dict.fromkeys(reasons)), "Leave share_prefixes out.")
    backbone = backbone_of(model)
    longest = [*limits(model), *([threshold] if (threshold := rope_scaling_threshold(model)) is not None else [])]
    if backbone is not None:
        add_model_wrappers(patches, backbone, SharePrefixes(min(longest, default=None)), at_head=False)


class SharePrefixes:
    """The change around a backbone's ``forward``: runs each common beginning once, and returns the batch's outputs.

    Args:
        longest: the positions from which rotary frequencies depend on the longest row, None for none.
    """

    def __init__(self, longest: int | None) -> None:
        self.traits = ModelTraits()
        self.longest = longest

    def __call__(self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
        """Run one forward; returns the model's output. A batch runs as it came if it shares too little, if it reads a
        cache or returns one that the caller may use, where rows are split over ranks by exchanging heads, and inside a
        compiled graph; with a warning if the model draws random numbers per token (dropout)."""
        ids, around, shard = inputs.get("input_ids"), current(), slot().shard
        given, whole = inputs, None if shard is None else shard.batch
        if whole is not None and isinstance(ids, torch.Tensor):
            ids = whole.batch.per_token.get("input_ids")
            given = {key: whole.batch.per_token.get(key, value) for key, value in inputs.items()}
            given["attention_mask"] = whole.batch.mask
        if (
            is_tracing()
            or not isinstance(ids, torch.Tensor)
            or ids.ndim != 2
            or ids.numel() < 2
            or (around is not None and around.reads_padding)
            or (shard is not None and whole is None)
            or wants_cache(model, inputs)
        ):
            return forward(inputs)
        batch = self._read(model, given, ids, None if whole is None else whole.batch.segments)
        if batch is None or (self.longest is not None and batch.highest >= self.longest):
            return forward(inputs)
        reasons = [*reasons_against_batch(model, inputs), *(random_parts(model) if model.training else ())]
        if is_compiled(model):
            reasons.append(Reason("traced", "it is compiled as a whole; compile its layers"))
        if reasons:
            texts = "; ".join(dict.fromkeys(reason.text for reason in reasons))
            name = type(model).__name__
            warn_once(f"share_prefixes=True: batches of {name} run with their prefixes repeated: {texts}")
            return forward(inputs)
        require_axattn_backend(self.traits, model)
        if whole is not None:
            return self._run_over_ranks(model, forward, given, batch, whole)
        return self._run(model, forward, inputs, batch)

    def missed(self, context: Context) -> str:
        """See `axattn.patches.forward_wrapper.WholeModel`: without it a batch is only slower."""
        return ""

    def _read(
        self, model: torch.nn.Module, inputs: dict[str, Any], ids: torch.Tensor, known: Segments | None
    ) -> _Batch | None:
        """What a batch shares; None if it runs as it came."""
        import numpy as np

        rows, length = ids.shape
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
            return None
        known = slot().known_documents if known is None else known
        if known is None or (known.rows, known.length) != (rows, length):
            known = documents(self.traits, model, inputs)
        elif known.stems is not None:
            return None
        real = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        positions = inputs.get("position_ids")
        if positions is None:
            document_ids = None if known is None else known.document_ids.to(ids.device)
            positions = own_positions(model, ids, real, document_ids)
        positions = positions.reshape(-1, positions.shape[-1])
        # a head may pass its targets on to its backbone, which does not read them
        per_token = [positions, *(x for key, x in unpadded_as(inputs, "cut").items() if key not in TARGETS)]
        if any(x.is_floating_point() or x.shape[0] not in (1, rows) or x.shape[1] != length for x in per_token):
            return None
        columns = [(real != 0).long()[..., None]]
        columns += [x.long().reshape(x.shape[0], length, -1).expand(rows, -1, -1) for x in per_token]
        table = torch.cat(columns, -1).flatten(0, 1).cpu().numpy()  # the one transfer to the host
        boundaries = [(0, length)] * rows if known is None else known.boundaries
        places = []
        for row, edges in enumerate(boundaries):
            for a, b in pairwise(edges):
                found = np.flatnonzero(table[row * length + a : row * length + b, 0]) + row * length + a
                if len(found) and found[-1] - found[0] + 1 != len(found):
                    return None  # padding between real tokens
                if len(found):
                    places.append(found)
        if not places:
            return None
        flat = np.concatenate(places)
        shared = shared_row(table[flat, 1:], [len(part) for part in places])
        return None if shared is None else _Batch(shared, flat, positions, int(table[flat, 1].max()))

    def _run(self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any], batch: _Batch) -> Any:
        ids, shared = inputs["input_ids"], batch.shared
        device, (rows, length) = ids.device, ids.shape
        keep, places, source = (
            on_device(torch.from_numpy(x), device) for x in (batch.places[shared.tokens], batch.places, shared.source)
        )
        one_row = UnpaddedBatch(keep, rows, length, places, source)
        given = unpadded_as(inputs, "copy") | {"use_cache": False, "return_dict": True}
        for key, value in {**unpadded_as(inputs, "cut"), "position_ids": batch.positions}.items():
            given[key] = one_row.flatten(value.expand(rows, *value.shape[1:]))
        segments = Segments((shared.boundaries,), device, (shared.stems,) if any(shared.stems) else None)
        shape = (1, shared.boundaries[-1])
        packed = segments if segments.packed else None
        context = Context(packed, shape, False, BoundaryInputs(), self, current(), unpadded=one_row)
        with assume(documents=segments), reading(context):  # `reading`: for models without an input hook
            output = forward(given)
        restore_outputs(model, output, one_row, "share_prefixes")
        return output.to_tuple() if inputs.get("return_dict") is False else output

    def _run_over_ranks(
        self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any], batch: _Batch, whole: Any
    ) -> Any:
        """As `_run`, with the row placed on the ranks of the batch; `inputs` are of the whole batch."""
        import numpy as np

        shared = batch.shared
        stems = shared.stems
        documents = [Document(((a, b),), stem) for (a, b), stem in zip(pairwise(shared.boundaries), stems, strict=True)]
        source = np.full(whole.batch.rows * whole.batch.length, -1)
        source[batch.places] = shared.source
        per_token = {**unpadded_as(inputs, "cut"), "position_ids": batch.positions}
        other = whole.other_tokens(documents, batch.places[shared.tokens], source, per_token)
        given = {**unpadded_as(inputs, "copy"), **other.inputs, "use_cache": False, "return_dict": True}
        context = Context(None, (1, other.shard.part), False, BoundaryInputs(), self, current(), other.shard)
        with assume(shard=other.shard), reading(context):
            output = forward(given)
        restore_outputs(model, output, other, "share_prefixes")
        return output.to_tuple() if inputs.get("return_dict") is False else output


class _Batch(NamedTuple):
    """What a batch shares.

    Attributes:
        shared: the row that runs.
        places: int64 ``[N]``, the flat indices of the batch's real tokens, document by document.
        positions: int64 ``[B or 1, S]``.
        highest: position of a real token.
    """

    shared: SharedRow
    places: np.ndarray
    positions: torch.Tensor
    highest: int
