"""Private names of Transformers' models and configs that axattn uses, each in one place. No decisions here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

CONFIG_NAME = "_attn_implementation_internal"
"""The attribute of a config that holds its attention implementation."""
SUPPORT = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn", "flash": "_supports_flash_attn"}
"""The attributes of a model class that declare the attention implementations it supports."""


def can_set_attention(cls: type) -> bool:
    """Whether Transformers can set the attention of a model class (it reads the source of the class's whole file); True
    if the class has no such method."""
    settable = getattr(cls, "_can_set_attn_implementation", None)
    return settable is None or bool(settable())


def supports(cls: type, kind: str) -> bool:
    """Whether a model class declares support for a kind of `SUPPORT`; True if it declares nothing."""
    return bool(getattr(cls, SUPPORT[kind], True))


def compatible_flash(cls: type) -> tuple[str, ...]:
    """The flash names that a model class lists; Transformers replaces any other by the first."""
    return tuple(getattr(cls, "_compatible_flash_implementations", None) or ())


def attention_classes(cls: type) -> list[Any]:
    """The attention classes whose weights a model class records, in its order."""
    recorded = (getattr(cls, "_can_record_outputs", None) or {}).get("attentions") or ()
    return [getattr(one, "target_class", one) for one in (recorded if isinstance(recorded, list) else [recorded])]


def window_of(module: torch.nn.Module) -> int | None:
    """The narrowest sliding window in a model's config, None if it has none."""
    config: Any = module.config
    text = config.get_text_config()
    windows = [getattr(c, name, None) for c in (config, text) for name in ("sliding_window", "local_attention")]
    return min((window for window in windows if isinstance(window, int) and window > 0), default=None)


def attribute_of(config: Any, name: str) -> Any:
    """An attribute of a config, None if it has none of its own. Not by ``__getattribute__``, which takes a
    microsecond."""
    if torch.compiler.is_compiling():  # Dynamo does not support object.__getattribute__
        return config.__dict__.get(name)
    return object.__getattribute__(config, "__dict__").get(name)


def wants_weights(config: Any) -> bool:
    """``config.output_attentions``."""
    return bool(attribute_of(config, "_output_attentions"))


def checkpoints_reentrantly(module: torch.nn.Module) -> bool:
    """Whether a model uses reentrant gradient checkpointing."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    keywords = getattr(function, "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"))


def checkpoints_without_cache(module: torch.nn.Module) -> bool:
    """Whether a model uses gradient checkpointing with a layer whose recomputation gets no cache."""
    return any(
        getattr(inner, "gradient_checkpointing", False) and not getattr(inner, "_can_checkpoint_with_cache", False)
        for inner in module.modules()
        if inner is not module
    )


def flash_slot() -> ModuleType:
    """The module with Transformers' process-wide slot for flash functions: ``_loaded_implementation`` holds the loaded
    name, ``lazy_import_flash_attention`` fills the slot."""
    import transformers.modeling_flash_attention_utils as slot

    found: ModuleType = slot
    return found
