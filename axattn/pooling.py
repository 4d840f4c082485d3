"""Which tokens of a row a model's outputs are read from, where it is not each from its own.

Read from the names of its heads and the source of its forward: padding there would be read, and rows that are packed or
put together have another first and last token.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.errors import Reason
from axattn.sources import code_of, file_source, is_named, signature_of, source_of

_ROW_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction", "RewardModel")


def one_a_row(model: torch.nn.Module) -> list[Reason]:
    """Heads that give one output a row, read at a fixed place of it: pooled or at the last token."""
    pooled = any(getattr(one, "pooler", None) is not None for one in (model, *model.children()))
    if pooled or is_named(model, (*_ROW_HEADS, "ForQuestionAnswering")):
        return [Reason("model", "it gives one output a row, read at a fixed place")]
    return []


def classifies_rows(model: torch.nn.Module) -> list[Reason]:
    """Heads whose one output a row, and one label, is that of its last document where rows are packed."""
    by_question = "question_positions" in signature_of(model).parameters  # Splinter
    if by_question or is_named(model, _ROW_HEADS):
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


def first_must_be_real(model: torch.nn.Module, native: str | None) -> str:
    """Why rows can't be padded on the left, ``""`` where they can: something reads padding, for which this kernel gives
    other values than eager attention.

    Args:
        model: a ``PreTrainedModel``.
        native: the native name that serves it, None for our names.
    """
    name = type(model).__name__
    config: Any = model.config
    if reads_first(model) and native not in ("eager", "sdpa"):
        return f"{name} reads the first token of each row, which is padding"
    if native != "eager" and "minimax_m3_sparse" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        return f"{name} selects blocks of keys counted from the row's start, and may select padding alone"
    return ""


def reads_last(model: torch.nn.Module) -> bool:
    """Whether a head reads the last real token of each row, found by its token id: those of decoders."""
    cls = code_of(model)
    if not is_named(model, _ROW_HEADS):
        return False
    shared = any(base.__name__.startswith("GenericFor") for base in cls.__mro__)
    return shared or "last_non_pad_token" in source_of(cls.forward)


def reads_padding(model: torch.nn.Module) -> bool:
    """Whether a head reads every token of a row, padding too: one that finds an answer takes a softmax over all."""
    return "start_positions" in signature_of(model).parameters
