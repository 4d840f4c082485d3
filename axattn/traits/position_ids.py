"""How a model counts positions: whether it reads ``position_ids``, where they start, how it counts without them.

Two sources: its code, and a run of it on a few tokens (`axattn.hf.probes`). Layers that count positions themselves
(`counting_layers`) are found by their code only: the run includes no layers.
"""

from __future__ import annotations

import ast
import functools
from typing import Any, NamedTuple

import torch

from axattn.errors import Reason
from axattn.hf import probes
from axattn.hf.module_walk import attribute, modules_of, named_modules
from axattn.hf.source_inspection import calls_of, code_of, file_source, is_readable, signature_of, source_of, tree_of
from axattn.hf.torch_internals import running_max
from axattn.hf.weak_cache import weak_cache
from axattn.traits.token_mixers import text_model

_OWN_COUNT = "create_position_ids_from_input_ids"
"""Transformers' function for fairseq's positions: tokens that are not padding count from ``padding_idx + 1``."""


class Counting(NamedTuple):
    """How a model counts positions if it is given none.

    Attributes:
        first: the position of a row's first token.
        by_mask: it counts the tokens that the mask keeps; otherwise all tokens of the row, or by token id if `first`
            is not 0.
    """

    first: int
    by_mask: bool


def unread_positions(model: torch.nn.Module) -> list[Reason]:
    """Why a model doesn't get the positions within documents from ``position_ids``: no forward in it takes them (BART's
    decoder), one ignores them (CSM's depth decoder, which also selects weights by index in the row), or its source and
    a run of it disagree.

    Relative position biases (T5) need none: they are the same in every document.

    Args:
        model: a ``PreTrainedModel``; of a composite one the text model is read.
    """
    from transformers import PreTrainedModel

    text = text_model(model)
    inner = [module for module in modules_of(text) if isinstance(module, PreTrainedModel)]
    dropping = [type(one).__name__ for one in inner if _drops_positions(code_of(one).forward)]
    if dropping:
        return [Reason("position_ids", f"{dropping[0]} ignores position_ids, and counts along the whole row")]
    if _takes_positions(text):
        return contradictions(text)
    if any(name.endswith("relative_attention_bias") for name, _ in named_modules(text)):
        return []
    return [Reason("position_ids", f"{type(text).__name__} takes no position_ids, and counts along the whole row")]


def contradictions(text: torch.nn.Module) -> list[Reason]:
    """Why a run of a text model shows other positions than its source, or positions of an unknown kind."""
    run = probes.position_counting(text) if _takes_positions(text) else None
    if run is None:
        return []
    by_source, name = _by_source(text), type(text).__name__
    if not run.read:
        if by_source is None:
            return [Reason("position_ids", f"{name} ignores position_ids, and counts along the whole row")]
        return [probes.disagreement(text, "it takes position_ids", "it ignores them, and counts along the whole row")]
    if by_source is None:
        known = _by_run(run) is not None
        return [] if known else [Reason("position_ids", f"{name} counts padded rows in an unknown way")]
    if by_source.first != run.first:
        source, other = (f"positions start at {first}" for first in (by_source.first, run.first))
        return [probes.disagreement(text, source, other)]
    if not _reproduces(by_source, run):
        ways = {True: "positions are counted from the mask", False: "they are not counted from the mask"}
        shown = ", ".join(map(str, run.padded))
        return [probes.disagreement(text, ways[by_source.by_mask], f"those after two tokens of padding are {shown}")]
    return []


def counting_layers(model: torch.nn.Module) -> list[Reason]:
    """Layers that count positions themselves and ignore ``position_ids`` (Llama 4's without RoPE)."""
    kinds: dict[str, Any] = {name: code_of(module) for name, module in named_modules(model) if _uses_count(module)}
    counting = [name for name, cls in kinds.items() if _counts_tokens(cls)]
    return [Reason("model", f"{name} counts positions among the tokens that it sees") for name in counting[:1]]


def first_position(model: torch.nn.Module) -> int:
    """The position of a row's first token: 0, or ``padding_idx + 1`` in the RoBERTa family."""
    return _counting(model).first


def counts_mask(model: torch.nn.Module) -> bool:
    """Whether a model computes positions from the attention mask if none are given (OPT).

    BioGPT's embedding could, but its decoder always passes it positions counted along the row.
    """
    return _counting(model).by_mask


def own_positions(
    model: torch.nn.Module, ids: torch.Tensor | None, mask: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """The positions that a model computes for the tokens of a padded batch if none are given.

    Args:
        model: the model.
        ids: ``[B, S]`` token ids, None if embeddings are given.
        mask: ``[B, S]``, nonzero for real tokens.
        documents: ``[B, S]``, the document id of each token, to restart positions in each document. None if every row
            is one document.

    Returns:
        int64 ``[B, S]``.
    """
    return count_positions(*_counting(model), ids, mask, documents)


def count_positions(
    first: int, by_mask: bool, ids: torch.Tensor | None, mask: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """`own_positions` for given `first_position` and `counts_mask`; in packed rows the positions that the model
    computes for each document alone (`documents`: ``[B, S]``, the document id of each token)."""
    by_id = bool(first) and ids is not None
    if ids is not None and by_id:
        each = ids.ne(first - 1).long()
    else:
        each = (mask != 0).long() if by_mask and not first else torch.ones_like(mask, dtype=torch.long)
    count = each.cumsum(-1)
    if documents is not None:
        starts = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        count = count - running_max(torch.where(starts.to(count.device), count - each, 0))
        if not by_id:  # padding after a document needs no higher positions than the document
            count = count.masked_fill(mask == 0, 1)
    if by_id:
        return count * each + first - 1
    return (count - 1).clamp(min=0) + first


def _takes_positions(text: torch.nn.Module) -> bool:
    """Whether some forward in a text model has a parameter ``position_ids``."""
    from transformers import PreTrainedModel

    inner = [module for module in modules_of(text) if isinstance(module, PreTrainedModel)]
    return any("position_ids" in signature_of(one).parameters for one in inner)


def _counting(model: torch.nn.Module) -> Counting:
    """From the source, which costs nothing in a forward; without source from a run. `contradictions` refuses models
    where both disagree."""
    text = text_model(model)
    by_source = _by_source(text)
    if by_source is None:
        run = probes.position_counting(text)
        by_source = None if run is None or not run.read else _by_run(run)
    return by_source or Counting(0, False)


def _by_source(text: torch.nn.Module) -> Counting | None:
    """None if a model, or a module in it with a padding token, has no source."""
    from transformers import PreTrainedModel

    first = 0
    for module in modules_of(text):
        padding = attribute(module, "padding_idx")
        if not isinstance(padding, int) and not isinstance(module, PreTrainedModel):
            continue
        cls = code_of(module)
        if not is_readable(cls):
            return None
        if attribute(module, "position_embedding_type") == "rotary":  # ESM-2: only differences of positions matter
            continue
        if isinstance(padding, int) and not first and _OWN_COUNT in source_of(cls.forward):
            first = padding + 1
    return Counting(first, _mentions_count(code_of(text).__module__))


def _by_run(run: probes.PositionCounting) -> Counting | None:
    """The `Counting` that reproduces a run, None for none."""
    ways = (Counting(run.first, False), Counting(run.first, True))
    return next((way for way in ways if _reproduces(way, run)), None)


def _reproduces(way: Counting, run: probes.PositionCounting) -> bool:
    ids, mask = (torch.tensor([row], device="cpu") for row in (run.ids, run.mask))  # models may be built on "meta"
    found = count_positions(*way, ids, mask)[mask != 0].tolist()
    return way.first == run.first and found == list(run.padded)


@weak_cache
def _drops_positions(forward: Any) -> bool:
    """Whether a forward sets given ``position_ids`` to None."""
    tree = tree_of(forward)
    given = [
        node
        for node in (() if tree is None else ast.walk(tree))
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith("position_ids is not None")
    ]
    return any(ast.unparse(line) == "position_ids = None" for node in given for line in node.body)


@functools.cache
def _mentions_count(module: str) -> bool:
    """Whether the file of a model computes positions from the attention mask."""
    source = file_source(module)
    mentions = "cumsum(attention_mask" in source or "attention_mask.cumsum" in source
    return mentions and "position_ids = torch.arange(" not in source


@weak_cache
def _counts_tokens(cls: Any) -> bool:
    """Whether the forward of a layer counts positions itself: ``torch.arange`` over a length, and not only if no
    ``position_ids`` are given."""
    from transformers import PreTrainedModel

    if issubclass(cls, PreTrainedModel) or not cls.__module__.startswith("transformers"):
        return False
    if "if position_ids is None" in source_of(cls.forward):
        return False
    ranges = [ast.unparse(call) for call in calls_of(cls.forward, "torch.arange")]
    return any(word in text for text in ranges for word in ("shape", "size(", "length", "seq_len"))


def _uses_count(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "attn_temperature_tuning", True)) and not getattr(module, "use_rope", False)
