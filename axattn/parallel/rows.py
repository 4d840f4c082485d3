"""Splits the inputs of a forward over ranks and puts its outputs together again. No attention here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from axattn.by_row import reasons_by_row
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.facts import Facts
from axattn.losses import IGNORE_INDEX, predicts_next, shifted
from axattn.numbering import own_positions
from axattn.parallel.collectives import gather
from axattn.reading import documents
from axattn.segments import Segments
from axattn.shares import Share

_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "labels", "shift_labels")
_COMPARED = ("input_ids", "position_ids", "labels", "attention_mask", "cu_seq_lens_q", "seq_idx")
_READ = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What the share says in their place."""
_FREE = ("num_items_in_batch", "use_cache", "return_dict", "logits_to_keep", "output_hidden_states", "past_key_values")
_REFUSED = {
    "output_attentions": "the weights of a row are on several ranks",
    "output_router_logits": "the balance of experts would be taken over one rank's tokens",
    "cache_position": "it numbers the tokens of the whole row",
}


@dataclass(frozen=True)
class Group:
    """A process group and this rank in it. Copies of a model share it; it can't be pickled.

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


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it reads values, and asks the other ranks
def split(
    model: torch.nn.Module, group: Group, inputs: dict[str, Any], facts: Facts
) -> tuple[Share, dict[str, Any], int]:
    """This rank's part of a batch that every rank of the group holds whole.

    Rows are padded to a multiple of P behind their end; labels are shifted before they are cut, so that no target is
    lost between two ranks.

    Args:
        model: the model.
        group: of the ranks.
        inputs: of its forward, by name.
        facts: about the model.

    Returns:
        The share, the inputs of this rank, and S before padding.

    Raises:
        InvalidInputError: the ranks' batches differ.
        UnsupportedAttentionError: an input whose part nobody knows.
    """
    _require_known(model, inputs)
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if not isinstance(tokens, torch.Tensor):
        raise InvalidInputError("there is nothing to split", [Reason("input_ids", "no input_ids and no inputs_embeds")])
    rows, length = tokens.shape[:2]
    _require_same(group, inputs, rows, length)
    segments = documents(facts, model, inputs)
    mask = inputs.get("attention_mask")
    P = group.ranks
    extra = -length % P
    whole = {key: inputs[key] for key in _PER_TOKEN if inputs.get(key) is not None}
    if "position_ids" not in whole:
        real = torch.ones(rows, length, device=tokens.device) if mask is None else mask
        whole["position_ids"] = own_positions(model, inputs.get("input_ids"), real)
    if "labels" in whole and "shift_labels" not in whole and predicts_next(model):
        whole["shift_labels"] = shifted(whole["labels"])
    part = (length + extra) // P
    start = group.rank * part
    given = {key: inputs[key] for key in _FREE if key in inputs and key != "past_key_values"} | {"use_cache": False}
    for key, value in whole.items():
        fill = IGNORE_INDEX if key in ("labels", "shift_labels") else 0
        given[key] = _behind(value, extra, fill)[:, start : start + part].contiguous()
    targets = whole.get("shift_labels", whole.get("labels"))
    if targets is not None and given.get("num_items_in_batch") is None:
        given["num_items_in_batch"] = (targets != IGNORE_INDEX).sum()
    padding = None if mask is None else _behind(mask.to(torch.bool), extra, False)
    if extra and segments is not None:  # the padding is a document of its own
        segments = Segments(tuple((*row, length + extra) for row in segments.boundaries), segments.device)
    elif extra and padding is None:
        padding = torch.arange(length + extra, device=tokens.device).expand(rows, -1) < length
    share = Share(group.handle, P, group.rank, rows, length + extra, segments, padding)
    return share, given, length


@torch.compiler.disable  # type: ignore[untyped-decorator]
def join(output: Any, share: Share, length: int) -> None:
    """Whole rows in an output that holds this rank's: logits, last hidden state, hidden states."""
    for key in ("logits", "last_hidden_state"):
        if output.get(key) is not None:
            output[key] = gather(output[key], 1, share.group)[:, :length]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(gather(x, 1, share.group)[:, :length] for x in output["hidden_states"])


def _behind(x: torch.Tensor, extra: int, fill: float) -> torch.Tensor:
    if not extra:
        return x
    shape = (x.shape[0], extra, *x.shape[2:])
    return torch.cat([x, x.new_full(shape, fill)], 1)


def _require_known(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    known = {*_PER_TOKEN, *_READ, *_FREE}
    reasons = [Reason(key, f"{key}: {text}") for key, text in _REFUSED.items() if _given(inputs.get(key))]
    reasons += [
        Reason(key, f"{key}: nobody declared how to split it")
        for key, value in inputs.items()
        if key not in known and key not in _REFUSED and _given(value)
    ]
    reasons += reasons_by_row(model, rows_stay=True)
    keep = inputs.get("logits_to_keep")
    if isinstance(keep, torch.Tensor) or keep:
        reasons.append(Reason("logits_to_keep", "logits_to_keep counts from the end of the whole row"))
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        reasons.append(Reason("attention_mask", "a mask that is not [B, S]"))
    positions = inputs.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.ndim != 2:
        reasons.append(Reason("position_ids", f"position_ids of shape {list(positions.shape)}"))
    if reasons:
        raise UnsupportedAttentionError(f"{type(model).__name__} can't take this batch in parts", reasons)


def _given(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or bool(value)


def _require_same(group: Group, inputs: dict[str, Any], rows: int, length: int) -> None:
    """One small collective a forward: ranks with other batches would mix their rows in silence, or hang."""
    device = next(x.device for x in inputs.values() if isinstance(x, torch.Tensor))
    sums = [torch.tensor(0, device=device)] * len(_COMPARED)
    for at, key in enumerate(_COMPARED):
        given = inputs.get(key)
        if isinstance(given, torch.Tensor):
            flat = given.to(device, torch.int64).flatten()
            sums[at] = (flat * torch.arange(1, flat.numel() + 1, device=device)).sum() + 1
    print_of = torch.stack([*(torch.tensor(n, device=device) for n in (rows, length)), *sums])
    found = [torch.empty_like(print_of) for _ in range(group.ranks)]
    dist.all_gather(found, print_of, group=group.handle)
    seen = [one.tolist() for one in found]
    if any(one != seen[0] for one in seen):
        shown = ", ".join(f"rank {at}: {one[0]} x {one[1]}" for at, one in enumerate(seen))
        other = [key for at, key in enumerate(_COMPARED) if len({one[2 + at] for one in seen}) > 1]
        raise InvalidInputError(
            "the ranks of a sequence-parallel group hold different batches",
            [Reason("input_ids", f"rows x tokens by rank: {shown}; they differ in {', '.join(other)}")],
            "Give every rank of the group the same batch: shard the data set over the other mesh dimension only.",
        )
