"""Splits the inputs of a forward over ranks and gathers its outputs. No attention here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from axattn.documents.boundaries import Segments
from axattn.documents.peft_row_effects import reasons_by_row
from axattn.documents.read_inputs import documents
from axattn.documents.sequence_shard import SequenceShard
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.hf.forward_inputs import COMPARED, INPUTS, Role, is_given, split_as, tokens_of
from axattn.hf.forward_outputs import Holds, tensors_of
from axattn.parallel.collectives import gather
from axattn.traits.losses import IGNORE_INDEX, predicts_next, shifted
from axattn.traits.model_traits import ModelTraits
from axattn.traits.position_ids import own_positions


@dataclass(frozen=True)
class Group:
    """A process group and this process's rank. Copies of a model share it; it can't be pickled.

    Attributes:
        handle: the ``torch.distributed`` process group.
    """

    handle: Any

    @property
    def ranks(self) -> int:
        """P."""
        return dist.get_world_size(self.handle)

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        return dist.get_rank(self.handle)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a sequence-parallel model can't be pickled: it holds a process group. Use axattn.restore(model) first, "
            "or save_pretrained."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it reads values and communicates with other ranks
def split(
    model: torch.nn.Module, group: Group, inputs: dict[str, Any], traits: ModelTraits
) -> tuple[SequenceShard, dict[str, Any], int]:
    """This rank's part of a batch that every rank of the group holds whole.

    Rows are padded on the right to a multiple of P; labels are shifted before the split, so that no target is lost
    between two ranks.

    Args:
        model: the model.
        group: of the ranks.
        inputs: of its forward, by name.
        traits: of the model.

    Returns:
        The shard, the inputs of this rank, and S before padding.

    Raises:
        InvalidInputError: the ranks' batches differ.
        UnsupportedAttentionError: an input that can't be split.
    """
    _require_known(model, inputs)
    tokens = tokens_of(inputs)
    if tokens is None:
        raise InvalidInputError("there is nothing to split", [Reason("input_ids", "no input_ids and no inputs_embeds")])
    rows, length = tokens.shape[:2]
    _require_same(group, inputs, rows, length)
    segments = documents(traits, model, inputs)
    mask = inputs.get("attention_mask")
    P = group.ranks
    extra = -length % P
    whole = split_as(inputs, "cut")
    if "position_ids" not in whole:
        real = torch.ones(rows, length, device=tokens.device) if mask is None else mask
        whole["position_ids"] = own_positions(model, inputs.get("input_ids"), real)
    if "labels" in whole and "shift_labels" not in whole and predicts_next(model):
        whole["shift_labels"] = shifted(whole["labels"])
    part = (length + extra) // P
    start = group.rank * part
    given = split_as(inputs, "copy") | {"use_cache": False}
    for key, value in whole.items():
        fill = IGNORE_INDEX if INPUTS[key].role in (Role.LABELS, Role.TARGETS) else 0
        given[key] = _pad_end(value, extra, fill)[:, start : start + part].contiguous()
    targets = whole.get("shift_labels", whole.get("labels"))
    if targets is not None and given.get("num_items_in_batch") is None:
        given["num_items_in_batch"] = (targets != IGNORE_INDEX).sum()
    padding = None if mask is None else _pad_end(mask.to(torch.bool), extra, False)
    if extra and segments is not None:  # the padding becomes a separate document
        segments = Segments(tuple((*row, length + extra) for row in segments.boundaries), segments.device)
    elif extra and padding is None:
        padding = torch.arange(length + extra, device=tokens.device).expand(rows, -1) < length
    shard = SequenceShard(group.handle, P, group.rank, rows, length + extra, segments, padding)
    return shard, given, length


@torch.compiler.disable  # type: ignore[untyped-decorator]
def join(output: Any, shard: SequenceShard, length: int) -> None:
    """Replace this rank's part of the rows in an output by the whole rows.

    Raises:
        UnsupportedAttentionError: an unknown output may hold a value for each of this rank's tokens.
    """
    reasons = []
    for key, holds, value in tensors_of(output):
        if holds is Holds.TOKENS:
            output[key] = gather(value, 1, shard.group)[:, :length]
        elif holds is Holds.LAYERS:
            output[key] = tuple(gather(x, 1, shard.group)[:, :length] for x in value)
        elif holds is None:
            parts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(x, torch.Tensor) and shard.part in x.shape[:2] for x in parts):
                reasons.append(Reason("model", f"its output {key} is unknown and can't be gathered"))
    if reasons:
        raise UnsupportedAttentionError("this model's outputs can't be gathered", reasons, "Use gather=False.")


def _pad_end(x: torch.Tensor, extra: int, fill: float) -> torch.Tensor:
    if not extra:
        return x
    shape = (x.shape[0], extra, *x.shape[2:])
    return torch.cat([x, x.new_full(shape, fill)], 1)


def _require_known(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    reasons = []
    for key, value in inputs.items():
        one = INPUTS.get(key)
        if is_given(value) and (one is None or one.splits == "refuse"):
            why = one.why_not if one is not None else ""
            reasons.append(Reason(key, f"{key}: {why or 'there is no known way to split it'}"))
    reasons += reasons_by_row(model, rows_stay=True)
    keep = inputs.get("logits_to_keep")
    if isinstance(keep, torch.Tensor) or keep:
        reasons.append(Reason("logits_to_keep", "logits_to_keep counts from the end of the whole row"))
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        reasons.append(Reason("attention_mask", "the mask is not [B, S]"))
    positions = inputs.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.ndim != 2:
        reasons.append(Reason("position_ids", f"position_ids of shape {list(positions.shape)}"))
    if reasons:
        raise UnsupportedAttentionError(f"{type(model).__name__} can't run this batch split over ranks", reasons)


def _require_same(group: Group, inputs: dict[str, Any], rows: int, length: int) -> None:
    """Compare the batch across ranks with one small collective: different batches would mix rows silently, or hang."""
    device = next(x.device for x in inputs.values() if isinstance(x, torch.Tensor))
    sums = [torch.tensor(0, device=device)] * len(COMPARED)
    for at, key in enumerate(COMPARED):
        given = inputs.get(key)
        if isinstance(given, torch.Tensor):
            flat = given.to(device, torch.int64).flatten()
            sums[at] = (flat * torch.arange(1, flat.numel() + 1, device=device)).sum() + 1
    fingerprint = torch.stack([*(torch.tensor(n, device=device) for n in (rows, length)), *sums])
    gathered = [torch.empty_like(fingerprint) for _ in range(group.ranks)]
    dist.all_gather(gathered, fingerprint, group=group.handle)
    by_rank = [one.tolist() for one in gathered]
    if any(one != by_rank[0] for one in by_rank):
        shown = ", ".join(f"rank {at}: {one[0]} x {one[1]}" for at, one in enumerate(by_rank))
        other = [key for at, key in enumerate(COMPARED) if len({one[2 + at] for one in by_rank}) > 1]
        raise InvalidInputError(
            "the ranks of a sequence-parallel group hold different batches",
            [Reason("input_ids", f"rows x tokens by rank: {shown}; they differ in {', '.join(other)}")],
            "Pass the same batch to every rank of the group: shard the data set over the other mesh dimension only.",
        )
