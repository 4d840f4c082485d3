"""Patch: a door (see `axattn.door`) on every `PreTrainedModel` inside a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from axattn import names
from axattn.door import Door
from axattn.patches.patchset import PatchSet


def add_doors(
    patches: PatchSet, model: torch.nn.Module, modules: Iterable[torch.nn.Module], native: dict[int, str | None]
) -> None:
    """Put a door on the model and on every ``PreTrainedModel`` inside it.

    Args:
        patches: takes the hooks over.
        model: the model.
        modules: every module inside it, itself included.
        native: by ``id(config)``, the native name that Transformers serves there, None for our names.
    """
    from transformers import PreTrainedModel

    for module in [m for m in modules if isinstance(m, PreTrainedModel)]:
        door = Door(
            _positional(type(module).forward),
            native=native.get(id(module.config), native.get(id(model.config))),
            encoder_decoder=bool(getattr(module.config, "is_encoder_decoder", False)),
            position_planes=_planes(module.config),
        )
        patches.add_handle(module.register_forward_pre_hook(door.enter, with_kwargs=True, prepend=True))
        patches.add_handle(module.register_forward_hook(door.leave, always_call=True))


def native_name(name: str | None, default: str | None) -> str | None:
    """The native name that serves a config, None when one of our names does."""
    running = name or default
    return running if running is not None and running not in names.OURS else None


@functools.cache
def _positional(forward: Any) -> tuple[str, ...]:
    """Names of the positional parameters of a class's ``forward``, without ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters
    return tuple(name for name, parameter in parameters.items() if parameter.kind in kinds)[1:]


def _planes(config: Any) -> tuple[int, ...]:
    """Leading planes of position_ids in models with multimodal rotary embeddings (Qwen-VL: 3, or 4 with text first)."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return (3, 4) if isinstance(parameters, dict) and "mrope_section" in parameters else ()
