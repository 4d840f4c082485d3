"""Which tokens of a row a model's outputs are read from, where it is not each from its own.

Read from the names of its heads and the source of its forward: padding there is read too, and rows that are packed or
put together have another first and last token.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch

from axattn.errors import InvalidInputError, Reason
from axattn.facts import Facts
from axattn.hf.source_inspection import calls_of, code_of, file_source, is_named, signature_of, source_of, tree_of

Place = Literal["first", "last", "every"]

_ROW_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction", "RewardModel")
_PICKED: dict[int, Place] = {0: "first", -1: "last"}
_SIDES = {"first": "left", "last": "right"}


def read_at(model: torch.nn.Module) -> frozenset[Place]:
    """Where outputs are read from, whatever stands there: the first token of each row (BERT's pooler), the last
    (SigLIP's text model), or every one (heads that find answers take a softmax over all of them).

    Args:
        model: a ``PreTrainedModel``; models inside of it are not looked at.
    """
    if "start_positions" in signature_of(model).parameters:
        return frozenset({"every"})
    if is_named(model, _ROW_HEADS):
        return frozenset({"first"}) if reads_first(model) else frozenset()
    if getattr(model, "pooler", model) is None:  # `add_pooling_layer=False`
        return frozenset()
    parts = list(_own_parts(model))
    if any(getattr(part, "summary_type", "") == "mean" for part in parts):  # GPT-2 with two heads
        return frozenset({"every"})
    picked = {token for part in parts for token in _picked(code_of(part).forward)}
    return frozenset(_PICKED[token] for token in picked)


def padding_is_read(facts: Facts, model: torch.nn.Module, given: dict[str, Any]) -> bool:
    """Whether outputs of this forward are read from padding, for which only dense masks give what eager attention does.

    Args:
        facts: about the model.
        model: for the message.
        given: its inputs, by name.

    Raises:
        InvalidInputError: they are, on a name for which Transformers leaves padding out, or in a model whose padding
            may see padding alone. In a compiled graph any such padding is refused, by an assertion when that runs.
    """
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    tokens = ids if ids is not None else given.get("inputs_embeds")
    if "every" in facts.reads:
        return True
    if facts.native in ("eager", "sdpa") or not isinstance(mask, torch.Tensor) or not isinstance(tokens, torch.Tensor):
        return False
    if mask.ndim < 2 or mask.shape != tokens.shape[: mask.ndim]:
        return False
    for place in sorted(facts.reads):
        read = mask[..., 0 if place == "first" else -1] != 0
        text = f"{type(model).__name__} reads the {place} token of each row, which is padding"
        if torch.compiler.is_compiling():
            torch._assert_async(read.all(), f"axattn: {text}")
        elif not bool(read.all()):
            blind = facts.windowed or (place == "first" and getattr(model.config, "is_decoder", False))
            if facts.native is None and not blind:  # else it may attend to padding alone: kernels differ in that
                return True
            other = {"left": "right", "right": "left"}[_SIDES[place]]
            advice = f'Set tokenizer.padding_side = "{other}", or use attn_implementation="eager".'
            raise InvalidInputError(f"rows are padded on the {_SIDES[place]}", [Reason("padding", text)], advice)
    return False


def first_token_pooler(model: torch.nn.Module) -> torch.nn.Module | None:
    """The part of a model that is handed whole rows ``[B, S, D]`` and reads the first token of each (BERT's pooler)."""
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, torch.nn.Module) or _picked(code_of(_unwrapped(pooler)).forward) != {0}:
        return None
    calls = calls_of(code_of(model).forward, "self.pooler")
    handed = len(calls) == 1 and len(calls[0].args) == 1 and isinstance(calls[0].args[0], ast.Name)
    return pooler if handed and not calls[0].keywords else None


def pools(model: torch.nn.Module) -> bool:
    """Whether a model itself makes one output a row beside those of each token (``pooler_output``)."""
    forward = source_of(code_of(model).forward)
    return "pooler_output=" in forward and getattr(model, "pooler", model) is not None


def _own_parts(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A model and the parts right under it that are no models: its pooler, its head."""
    from transformers import PreTrainedModel

    yield model
    for part in model.children():
        if not isinstance(part, PreTrainedModel):
            yield _unwrapped(part)


def _unwrapped(part: torch.nn.Module) -> torch.nn.Module:
    """What a wrapper holds: PEFT's of ``modules_to_save``, torch's of compiled and checkpointed modules."""
    for name in ("original_module", "_orig_mod", "_checkpoint_wrapped_module"):
        inner = getattr(part, name, None)
        if isinstance(inner, torch.nn.Module):
            return _unwrapped(inner)
    return part


@functools.cache
def _picked(function: Any) -> frozenset[int]:
    """The tokens that a function picks out of each row: 0 of ``hidden[:, 0]``, -1 of ``hidden[:, -1, :]``."""
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
    """Heads that give one output a row, read at a fixed place of it: pooled or at the last token.

    Args:
        model: a ``PreTrainedModel``.
        unless_first: leave out what a `first_token_pooler` gives.
    """
    from transformers import PreTrainedModel

    every = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    inner = [one for one in every if "input_ids" in signature_of(one).parameters]  # no vision tower
    pooled = any(pools(one) and not (unless_first and first_token_pooler(one) is not None) for one in inner)
    if pooled or reads_rows(model):
        return [Reason("model", "it gives one output a row, read at a fixed place")]
    return []


def reads_rows(model: torch.nn.Module) -> bool:
    """Whether a head, by its name, makes its output of whole rows: it classifies them, or finds an answer in each."""
    return is_named(model, (*_ROW_HEADS, "ForQuestionAnswering"))


def classifies_rows(model: torch.nn.Module) -> list[Reason]:
    """Heads whose one output a row, and one label, is that of its last document where rows are packed."""
    parameters = signature_of(model).parameters
    labelled = {"question_positions", "next_sentence_label", "sentence_order_label"} & set(parameters)  # Splinter, BERT
    if labelled or is_named(model, _ROW_HEADS):
        return [Reason("model", "it gives one output a row, and packed rows hold several documents")]
    return []


def reads_first(model: torch.nn.Module) -> bool:
    """Whether a head reads the first token of each row: those of encoders, unless they pool in another way."""
    cls = code_of(model)
    pooling = getattr(model.config, "classifier_pooling", getattr(model, "pooling", "cls"))
    if not is_named(model, _ROW_HEADS) or pooling not in ("cls", "bos"):
        return False
    last = reads_last(model) or any(word in source_of(cls.forward) for word in ("eos_mask", "pad_token_id"))
    return not last and "[:, 0" in file_source(cls.__module__)


def reads_last(model: torch.nn.Module) -> bool:
    """Whether a head reads the last real token of each row, found by its token id: those of decoders."""
    cls = code_of(model)
    if not is_named(model, _ROW_HEADS):
        return False
    shared = any(base.__name__.startswith("GenericFor") for base in cls.__mro__)
    return shared or "last_non_pad_token" in source_of(cls.forward)
