"""How a model computes its loss: whether it predicts the next token, and whether it takes targets already shifted."""

from __future__ import annotations

import functools
from typing import Any

import torch

from axattn.hf.source_inspection import calls_of, code_of, is_named, source_of

IGNORE_INDEX = -100


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """``[B, S]``: what each token predicts in its own row; the last one of a row predicts nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def predicts_next(model: Any) -> bool:
    """Whether a model's loss is that of the next token, with labels as the inputs are: read in its forward's source.

    ``GPT2LMHeadModel`` does so by the loss that Transformers gives it; ``WhisperForCausalLM`` compares each token with
    the label in its place. Where there is no source the name has to do.
    """
    forward = code_of(model).forward
    named = is_named(model, ("ForCausalLM", "LMHeadModel"))
    if calls_of(forward, "self.loss_function"):
        return named or getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
    source = source_of(forward)
    return named and (not source or any(how in source for how in ("shift_l", "shifted_", ", 1:]")))


@functools.cache
def takes_keywords(cls: Any) -> bool:
    """Whether a model hands its keywords (``shift_labels``, ``num_items_in_batch``) to ``self.loss_function``.

    Read in the source of its forward; unreadable source counts as no.
    """
    losses = calls_of(cls.forward, "self.loss_function")
    return bool(losses) and all(any(keyword.arg is None for keyword in call.keywords) for call in losses)
