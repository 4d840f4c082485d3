"""Which tokens of a row a model's outputs are read from, if not each output from its own token.

Read from the names of its heads, the source of its forward and a run of it on a few tokens (`axattn.hf.probes`). Such
outputs may be read from padding, and packed or joined rows have other first and last tokens.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any, Literal

import torch

from axattn.errors import Reason
from axattn.hf import probes
from axattn.hf.module_walk import attribute, modules_of
from axattn.hf.source_inspection import (
    calls_of,
    code_of,
    file_source,
    is_named,
    is_readable,
    signature_of,
    source_of,
    tree_of,
)
from axattn.hf.weak_cache import weak_cache
from axattn.traits.picked_tokens import Pick, picks_of

Place = Literal["first", "last", "every"]

_ROW_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction", "RewardModel")
_PICKED: dict[int, Place] = {0: "first", -1: "last"}
_AT: dict[probes.Pattern, Place] = {"first": "first", "last": "last", "every": "every"}
"""Patterns that also read padding."""
_WORDS: dict[probes.Pattern, str] = {
    "first": "the first token of a row",
    "last": "the last token of a row",
    "first_real": "the first token that is not padding",
    "last_real": "the last token that is not padding",
    "every": "every token, padding too",
    "real": "every token that is not padding",
    "other": "tokens at no fixed place",
}


def read_at(model: torch.nn.Module) -> frozenset[Place]:
    """Places that outputs are read from even if they are padding: the first token of each row (BERT's pooler), the last
    (SigLIP's text model), or every one (question answering heads take a softmax over all).

    Includes every place that the source or a run shows: a wrong one costs only a dense mask.

    Args:
        model: a ``PreTrainedModel``; the source of inner models is not read.
    """
    return (_places_by_source(model) or frozenset()) | _places_by_run(model)


def _places_by_source(model: torch.nn.Module) -> frozenset[Place] | None:
    """None if the source can't be read."""
    if "start_positions" in signature_of(model).parameters:
        return frozenset({"every"})
    if is_named(model, _ROW_HEADS):
        return frozenset({"first"}) if reads_first(model) else frozenset()
    if getattr(model, "pooler", model) is None:  # `add_pooling_layer=False`
        return frozenset()
    parts = list(_own_parts(model))
    if any(getattr(part, "summary_type", "") == "mean" for part in parts):  # GPT-2 with two heads
        return frozenset({"every"})
    if not all(is_readable(code_of(part)) for part in parts):
        return None
    picked = {token for part in parts for token in _picked(code_of(part).forward)}
    return frozenset(_PICKED[token] for token in picked)


def _places_by_run(model: torch.nn.Module) -> frozenset[Place]:
    run = probes.token_mixing(model)
    return frozenset(_AT[pattern] for _, pattern in (run.rows if run is not None else ()) if pattern in _AT)


def contradictions(model: torch.nn.Module) -> list[Reason]:
    """Contradictions between the source of a model, or of one inside it, and a run of it about which tokens are read.

    More places in the source are no contradiction: the config may choose one of them.
    """
    from transformers import PreTrainedModel

    every = [one for one in modules_of(model) if isinstance(one, PreTrainedModel)]
    inner = [one for one in every if "input_ids" in signature_of(one).parameters]  # no vision tower
    return list(dict.fromkeys(reason for one in inner for reason in _contradictions(one)))


def _contradictions(model: torch.nn.Module) -> list[Reason]:
    from transformers import PreTrainedModel

    run = probes.token_mixing(model)
    if run is None:
        return []
    patterns = {pattern for _, pattern in run.rows}
    shown = " and ".join(_WORDS[pattern] for pattern in sorted(patterns)) or "no token in particular"
    if is_named(model, _ROW_HEADS):
        by_source = _head_by_source(model) if is_readable(code_of(model)) else None
        if by_source is None or by_source in patterns:
            return []
        return [probes.disagreement(model, f"{_WORDS[by_source]} is read", f"{shown} is")]
    found = [_places_by_source(one) for one in modules_of(model) if isinstance(one, PreTrainedModel)]
    places = frozenset(place for one in found if one is not None for place in one)
    if None not in found and not {_AT[pattern] for pattern in patterns if pattern in _AT} <= places:
        source = " and ".join(_WORDS[place] for place in sorted(places)) or "no token in particular"
        return [probes.disagreement(model, f"{source} is read", f"{shown} is")]
    if _pooler_by_source(model) is not None and not _pools_first(run):
        return [probes.disagreement(model, "its pooler reads the first token of each row", f"{shown} is read")]
    return []


def first_token_pooler(model: torch.nn.Module) -> torch.nn.Module | None:
    """The part of a model that gets whole rows ``[B, S, D]`` and reads the first token of each (BERT's pooler)."""
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, torch.nn.Module):
        return None
    readable = is_readable(code_of(model)) and is_readable(code_of(_unwrapped(pooler)))
    if readable:
        return _pooler_by_source(model)
    run = probes.token_mixing(model)
    return pooler if run is not None and _pools_first(run) else None


def _pooler_by_source(model: torch.nn.Module) -> torch.nn.Module | None:
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, torch.nn.Module) or _picked(code_of(_unwrapped(pooler)).forward) != {0}:
        return None
    calls = calls_of(code_of(model).forward, "self.pooler")
    passed = len(calls) == 1 and len(calls[0].args) == 1 and isinstance(calls[0].args[0], ast.Name)
    return pooler if passed and not calls[0].keywords else None


def _pools_first(run: probes.TokenMixing) -> bool:
    return run.pooled and {pattern for _, pattern in run.rows} == {"first"}


def pools(model: torch.nn.Module) -> bool:
    """Whether a model itself returns one output per row (``pooler_output``) beside those of each token, according to
    its source or a run."""
    if "pooler_output=" in source_of(code_of(model).forward) and getattr(model, "pooler", model) is not None:
        return True
    run = probes.token_mixing(model)
    return run is not None and any(name == "pooler_output" for name, _ in run.rows)


def _own_parts(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A model and its direct children that are not models: its pooler, its head."""
    from transformers import PreTrainedModel

    yield model
    for part in model.children():
        if not isinstance(part, PreTrainedModel):
            yield _unwrapped(part)


def _unwrapped(part: torch.nn.Module) -> torch.nn.Module:
    """The module inside a wrapper: PEFT's ``modules_to_save``, torch's compiled and checkpointed modules."""
    for name in ("original_module", "_orig_mod", "_checkpoint_wrapped_module"):
        inner = attribute(part, name)
        if isinstance(inner, torch.nn.Module):
            return _unwrapped(inner)
    return part


@weak_cache
def _picked(function: Any) -> frozenset[int]:
    """The tokens that a function selects from each row: 0 for ``hidden[:, 0]``, -1 for ``hidden[:, -1, :]``."""
    found = set()
    tree = tree_of(function)
    for node in () if tree is None else ast.walk(tree):
        if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
            continue
        if not isinstance(node.slice, ast.Tuple) or len(node.slice.elts) < 2:
            continue
        rows, token = (ast.unparse(index) for index in node.slice.elts[:2])
        named = ast.unparse(node.value)
        if rows == ":" and token in ("0", "-1") and not any(word in named for word in ("ids", "mask", "position")):
            found.add(int(token))
    return frozenset(found)


def one_a_row(model: torch.nn.Module, *, unless_first: bool = False) -> list[Reason]:
    """Heads that return one output per row, read at a fixed place: pooled or at the last token.

    Args:
        model: a ``PreTrainedModel``.
        unless_first: leave out the output of a `first_token_pooler`.
    """
    from transformers import PreTrainedModel

    every = [one for one in modules_of(model) if isinstance(one, PreTrainedModel)]
    inner = [one for one in every if "input_ids" in signature_of(one).parameters]  # no vision tower
    pooled = any(pools(one) and not (unless_first and first_token_pooler(one) is not None) for one in inner)
    if pooled or reads_rows(model):
        return [Reason("model", "it gives one output a row, read at a fixed place")]
    return []


def reads_rows(model: torch.nn.Module) -> bool:
    """Whether a head, by its class name, reads whole rows: it classifies them, or finds an answer in each."""
    return is_named(model, (*_ROW_HEADS, "ForQuestionAnswering"))


def classifies_rows(model: torch.nn.Module) -> list[Reason]:
    """Heads with one output and one label per row, which in packed rows would be those of the last document; and models
    where it is unknown which tokens are read (`contradictions`)."""
    parameters = signature_of(model).parameters
    labelled = {"question_positions", "next_sentence_label", "sentence_order_label"} & set(parameters)  # Splinter, BERT
    if labelled or is_named(model, _ROW_HEADS):
        return [Reason("model", "it gives one output a row, and packed rows hold several documents")]
    return _contradictions(model)


def reads_tokens(model: torch.nn.Module) -> bool:
    """Whether a model reads certain tokens of its inner model's output: it classifies rows, pools, or picks."""
    return bool(classifies_rows(model) or read_at(model) or picked(model))


def reads_first(model: torch.nn.Module) -> bool:
    """Whether a head reads the first token of each row, as encoders do unless they pool differently."""
    return _row_head_reads(model) == "first"


def reads_last(model: torch.nn.Module) -> bool:
    """Whether a head reads the last real token of each row, found by token id, as decoders do."""
    return _row_head_reads(model) == "last_real"


def picked(model: torch.nn.Module) -> tuple[Pick, ...]:
    """The tokens of a row that a model finds by id (`axattn.traits.picked_tokens`)."""
    if is_readable(code_of(model)):
        return picks_of(model, _own_parts(model))
    return (Pick("last_not_pad"),) if reads_last(model) else ()


def _row_head_reads(model: torch.nn.Module) -> probes.Pattern | None:
    """The token that a head that classifies rows reads; None for other heads, or if unknown."""
    if not is_named(model, _ROW_HEADS):
        return None
    if is_readable(code_of(model)):
        return _head_by_source(model)
    run = probes.token_mixing(model)
    patterns = {pattern for _, pattern in (run.rows if run is not None else ())}
    return patterns.pop() if len(patterns) == 1 else None


def _head_by_source(model: torch.nn.Module) -> probes.Pattern | None:
    """The token that a head that classifies rows reads according to its source; None if the source doesn't show it."""
    cls: Any = code_of(model)
    shared = any(base.__name__.startswith("GenericFor") for base in cls.__mro__)
    if shared or "last_non_pad_token" in source_of(cls.forward):
        return "last_real"
    pooling = getattr(model.config, "classifier_pooling", getattr(model, "pooling", "cls"))
    if pooling not in ("cls", "bos") or any(word in source_of(cls.forward) for word in ("eos_mask", "pad_token_id")):
        return None
    return "first" if "[:, 0" in file_source(cls.__module__) else None
