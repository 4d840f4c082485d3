"""Splits the inputs of a forward over ranks and gathers its outputs. No attention here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from axattn.documents.boundaries import Ranges, Segments
from axattn.documents.peft_row_effects import reasons_by_row
from axattn.documents.placement import Document, Placement
from axattn.documents.read_inputs import documents
from axattn.documents.sequence_shard import SequenceShard
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.hf.forward_inputs import COMPARED, INPUTS, Role, is_given, split_as, tokens_of
from axattn.hf.forward_outputs import Holds, tensors_of
from axattn.hf.transfers import on_device
from axattn.parallel.collectives import gather
from axattn.parallel.travel import travel_of
from axattn.parallel.whole_batch import Batch, WholeBatch
from axattn.traits.losses import IGNORE_INDEX, predicts_next, shifted
from axattn.traits.model_traits import ModelTraits
from axattn.traits.position_ids import own_positions


@dataclass(frozen=True)
class Group:
    """The process groups of the ranks that share rows. Copies of a model share it; it can't be pickled.

    Attributes:
        handle: the ``torch.distributed`` process group; of a two-dimensional mesh that of its last dimension.
        outer: that of the first of two dimensions, else None.
    """

    handle: Any
    outer: Any = None

    @property
    def handles(self) -> tuple[Any, ...]:
        """The process groups, the innermost first."""
        return (self.handle,) if self.outer is None else (self.handle, self.outer)

    @property
    def ranks(self) -> int:
        """All ranks that share rows."""
        return math.prod(map(dist.get_world_size, self.handles))

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a sequence-parallel model can't be pickled: it holds a process group. Use axattn.restore(model) first, "
            "or save_pretrained."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it reads values and communicates with other ranks
def read_batch(model: torch.nn.Module, group: Group, inputs: dict[str, Any], traits: ModelTraits) -> Batch:
    """The batch of a forward.

    Args:
        model: the model.
        group: of the ranks.
        inputs: of its forward, by name.
        traits: of the model.

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
    mask = inputs.get("attention_mask")
    per_token = split_as(inputs, "cut")
    if "position_ids" not in per_token:
        real = torch.ones(rows, length, device=tokens.device) if mask is None else mask
        per_token["position_ids"] = own_positions(model, inputs.get("input_ids"), real)
    if "labels" in per_token and "shift_labels" not in per_token and predicts_next(model):
        per_token["shift_labels"] = shifted(per_token["labels"])
    settings = split_as(inputs, "copy") | {"use_cache": False}
    targets = per_token.get("shift_labels", per_token.get("labels"))
    if targets is not None and settings.get("num_items_in_batch") is None:
        settings["num_items_in_batch"] = (targets != IGNORE_INDEX).sum()
    return Batch(rows, length, documents(traits, model, inputs), mask, per_token, settings, tokens.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def split_rows(batch: Batch, group: Group) -> tuple[SequenceShard, dict[str, Any]]:
    """This rank's S / P consecutive tokens of each row, padded on the right to a multiple of P; and its inputs."""
    ranks, rank = dist.get_world_size(group.handle), dist.get_rank(group.handle)
    extra = -batch.length % ranks
    length = batch.length + extra
    part = length // ranks
    given = dict(batch.settings)
    for key, value in batch.per_token.items():
        given[key] = _pad_end(value, extra, _fill(key))[:, rank * part : (rank + 1) * part].contiguous()
    segments = batch.segments
    padding = None if batch.mask is None else _pad_end(batch.mask.to(torch.bool), extra, False)
    if extra and segments is not None:  # the padding becomes a separate document
        segments = Segments(tuple((*row, length) for row in segments.boundaries), segments.device)
    elif extra and padding is None:
        padding = torch.arange(length, device=batch.device).expand(batch.rows, -1) < batch.length
    return SequenceShard(group.handle, ranks, rank, batch.rows, length, segments, padding), given


def documents_of(batch: Batch) -> tuple[list[Document], bool]:
    """The documents of a batch without padding, and whether one of them has padding between its tokens."""
    length, mask = batch.length, batch.mask_on_host
    found, holes = [], False
    for row in range(batch.rows):
        first = row * length
        edges = (0, length) if batch.segments is None else batch.segments.boundaries[row]
        stems = None if batch.segments is None or batch.segments.stems is None else batch.segments.stems[row]
        for number, (a, b) in enumerate(pairwise(edges)):
            own: Ranges = ((first + a, first + b),) if mask is None else _runs(mask[row, a:b], first + a)
            if own:
                stem = () if stems is None else tuple((first + x, first + y) for x, y in stems[number])
                found.append(Document(own, stem))
                holes = holes or len(own) > 1
    return found, holes


def _runs(real: torch.Tensor, start: int) -> Ranges:
    """The ranges of real tokens of a part of a row that begins at token `start`."""
    edges = torch.nn.functional.pad(real.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
    return tuple((start + a, start + b) for a, b in zip(edges[::2], edges[1::2], strict=True))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def place_tokens(
    batch: Batch, group: Group, placement: Placement, travels: bool
) -> tuple[SequenceShard, dict[str, Any]]:
    """This rank's tokens of a batch in one row, and its inputs.

    Args:
        batch: the batch.
        group: of the ranks.
        placement: on the ranks of the group, on a two-dimensional mesh on those of its first dimension.
        travels: the model has layers with a state.
    """
    if group.outer is None:
        inner, ranks, rank, fetch_group = None, 1, 0, group.handle
    else:
        inner, fetch_group = group.handle, group.outer
        ranks, rank = dist.get_world_size(inner), dist.get_rank(inner)
    fetch_rank = dist.get_rank(fetch_group)
    travel = travel_of(placement, fetch_rank, fetch_group, batch.device) if travels else None
    whole = None
    if inner is None:
        whole = WholeBatch(batch, placement, fetch_rank, fetch_group, travels)
    own = placement, fetch_group, fetch_rank, travel, whole
    shard = SequenceShard(inner, ranks, rank, 1, placement.slots, None, None, *own)
    held = torch.from_numpy(placement.held(fetch_rank))[rank * shard.part : (rank + 1) * shard.part]
    index = on_device(held, batch.device)
    given = dict(batch.settings)
    for key, value in batch.per_token.items():
        flat = value.expand(batch.rows, *value.shape[1:]).flatten(0, 1)
        given[key] = _pad_end(flat.index_select(0, index)[None], shard.part - len(held), _fill(key))
    return shard, given


@torch.compiler.disable  # type: ignore[untyped-decorator]
def join(output: Any, shard: SequenceShard, rows: int, length: int) -> None:
    """Replace this rank's part of the rows in an output by the whole rows.

    Args:
        output: a ``ModelOutput``, changed in place.
        shard: this rank's.
        rows: B of the batch.
        length: S of the batch.

    Raises:
        UnsupportedAttentionError: an unknown output may hold a value for each of this rank's tokens.
    """
    reasons = []
    for key, holds, value in tensors_of(output):
        if holds is Holds.TOKENS:
            output[key] = _whole(value, shard, rows, length)
        elif holds is Holds.LAYERS:
            output[key] = tuple(_whole(x, shard, rows, length) for x in value)
        elif holds is None:
            parts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(x, torch.Tensor) and shard.part in x.shape[:2] for x in parts):
                reasons.append(Reason("model", f"its output {key} is unknown and can't be gathered"))
    if reasons:
        raise UnsupportedAttentionError("this model's outputs can't be gathered", reasons, "Use gather=False.")


def _whole(x: torch.Tensor, shard: SequenceShard, rows: int, length: int) -> torch.Tensor:
    """The ranks' tokens ``[B or 1, S / P, ...]`` as the whole batch, ``[B, S, ...]``."""
    if shard.ranks > 1:
        x = gather(x, 1, shard.group)
    if shard.placement is None:
        return x[:, :length]
    placement = shard.placement
    x = gather(x, 1, shard.fetch_group)
    index = torch.from_numpy(placement.owner.astype("int64") * placement.slots + placement.slot)
    return x[0].index_select(0, on_device(index, x.device)).view(rows, length, *x.shape[2:])


def _fill(key: str) -> int:
    """The value of padding in an input with a value for each token."""
    return IGNORE_INDEX if INPUTS[key].role in (Role.LABELS, Role.TARGETS) else 0


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
    for handle in group.handles:  # [..., keys] of all ranks
        gathered = [torch.empty_like(fingerprint) for _ in range(dist.get_world_size(handle))]
        dist.all_gather(gathered, fingerprint, group=handle)
        fingerprint = torch.stack(gathered)
    by_rank = fingerprint.flatten(0, -2).tolist()
    if any(one != by_rank[0] for one in by_rank):
        shown = ", ".join(f"rank {at}: {one[0]} x {one[1]}" for at, one in enumerate(by_rank))
        other = [key for at, key in enumerate(COMPARED) if len({one[2 + at] for one in by_rank}) > 1]
        raise InvalidInputError(
            "the ranks of a sequence-parallel group hold different batches",
            [Reason("input_ids", f"rows x tokens by rank: {shown}; they differ in {', '.join(other)}")],
            "Pass the same batch to every rank of the group: shard the data set over the other mesh dimension only.",
        )
