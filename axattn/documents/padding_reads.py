"""Outputs that are read from padding (`axattn.traits.pooling`): computed as in eager attention, or refused."""

from __future__ import annotations

from typing import Any

import torch

from axattn.errors import InvalidInputError, Reason
from axattn.hf.torch_internals import is_tracing, needs_torch_operators, require_when_run
from axattn.traits.model_traits import ModelTraits

_SIDES = {"first": "left", "last": "right"}


def padding_is_read(traits: ModelTraits, model: torch.nn.Module, given: dict[str, Any]) -> bool:
    """Whether outputs of this forward are read from padding, where only dense masks match eager attention.

    Args:
        traits: the traits of the model.
        model: for the message.
        given: its inputs, by name.

    Raises:
        InvalidInputError: they are, on a name for which Transformers unpads, or in a model whose padding may attend to
            padding only. A compiled graph asserts when it runs that no such token is padding.
    """
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    tokens = ids if ids is not None else given.get("inputs_embeds")
    if "every" in traits.reads:
        return True
    if traits.native in ("eager", "sdpa") or not isinstance(mask, torch.Tensor) or not isinstance(tokens, torch.Tensor):
        return False
    if mask.ndim < 2 or mask.shape != tokens.shape[: mask.ndim]:
        return False
    for place in sorted(traits.reads):
        read = mask[..., 0 if place == "first" else -1] != 0
        text = f"{type(model).__name__} reads the {place} token of each row, which is padding"
        blind = traits.windowed or (place == "first" and getattr(model.config, "is_decoder", False))
        if is_tracing():
            if traits.native is None and not blind and needs_torch_operators():
                return True  # masks are dense there
            require_when_run(read.all(), text)
        elif not bool(read.all()):
            if traits.native is None and not blind:  # else it may attend to padding only, where kernels differ
                return True
            other = {"left": "right", "right": "left"}[_SIDES[place]]
            advice = f'Set tokenizer.padding_side = "{other}", or use attn_implementation="eager".'
            raise InvalidInputError(f"rows are padded on the {_SIDES[place]}", [Reason("padding", text)], advice)
    return False
