"""Refuses configs with impossible attention sizes, before anything is planned or built.

Checks only what holds for every model class of Transformers: sizes per stage (lists, tuples, dicts) are left to the
calls, and a width that heads don't divide to the model class itself, since many allow it.
"""

from __future__ import annotations

import math
from typing import Any

from axattn.errors import InvalidConfigError, Reason
from axattn.hf.checkpoints import require_constructible
from axattn.traits.layer_needs import sub_configs

_BY_STAGE = (list, tuple, dict)
_HEADS = ("num_attention_heads", "num_heads", "encoder_attention_heads")
_WIDTH = ("hidden_size", "d_model", "embed_dim")
_MAX_LAYERS = 1_000_000
"""A list of more layers would exhaust the memory before any error."""
_LAYERS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers")


def require_possible(config: Any, cls: Any = None) -> None:
    """Raise if a config has impossible numbers of heads, sizes, windows or layers.

    Args:
        config: a ``PreTrainedConfig``.
        cls: the model class, if known: it decides about a ``hidden_size`` that its heads don't divide.

    Raises:
        InvalidConfigError: with every such value.
    """
    found = [(path, layer) for path, inner in sub_configs(config) for layer in _by_layer(inner)]
    reasons = [reason for path, inner in found for reason in _reasons(inner, f"{path}." if path else "")]
    if reasons:
        text = f"the config of {config.model_type or type(config).__name__} describes no attention that can be computed"
        raise InvalidConfigError(text, list(dict.fromkeys(reasons)), "Correct these values in its config.json.")
    if cls is not None and any(_is_uneven(inner) for _, inner in found):
        require_constructible(cls, config)


def _by_layer(config: Any) -> list[Any]:
    """The config, or that of each of its layers where they differ (Gemma 4)."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def _first_of(config: Any, *names: str) -> tuple[str, Any]:
    """The first of `names` that has a value, and the value; None for heads, widths and layers per stage."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return name, None if len(names) > 1 and isinstance(value, _BY_STAGE) else value
    return names[0], None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _reasons(config: Any, path: str) -> list[Reason]:
    reasons: list[Reason] = []

    def add(name: str, value: Any, text: str) -> None:
        reasons.append(Reason("config", f"{path}{name}={value!r} {text}"))

    latent = _first_of(config, "qk_nope_head_dim")[1] is not None  # multi-head latent attention has its own head dims
    for names in (_HEADS, _WIDTH, ("num_key_value_heads",), ("v_head_dim",) if latent else ("head_dim",)):
        name, value = _first_of(config, *names)
        if value is not None and not _is_count(value):
            add(name, value, "is not a whole number of 1 or more")
    _, heads = _first_of(config, *_HEADS)
    _, kv_heads = _first_of(config, "num_key_value_heads")
    if _is_count(heads) and _is_count(kv_heads) and not latent and heads % kv_heads:
        add("num_key_value_heads", kv_heads, f"does not divide num_attention_heads={heads}")
    size_name, size = _first_of(config, *_WIDTH)
    _, head_dim = _first_of(config, "head_dim")
    if _is_count(heads) and _is_count(size) and head_dim is None and not latent and size < heads:
        add(size_name, size, f"is less than one value for each of {heads} heads")
    name, layers = _first_of(config, *_LAYERS)
    if layers is not None and (
        isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= _MAX_LAYERS
    ):
        add(name, layers, "is not a number of layers")
    return [*reasons, *_window_reasons(config, path), *_number_reasons(config, path)]


def _window_reasons(config: Any, path: str) -> list[Reason]:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not (isinstance(kinds, list | tuple) and all(isinstance(kind, str) for kind in kinds)):
        return [Reason("config", f"{path}layer_types={kinds!r} is not a list of names of layers")]
    reasons = []
    for name, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        value = getattr(config, name, None)
        if value is None or value is False or _is_count(value):
            continue
        # 0 means "none" in configs of layers that have no window (Qwen2-MoE)
        alone = kinds is None and getattr(config, "use_sliding_window", True) and hasattr(type(config), name)
        if value == 0 and isinstance(value, int) and not (alone or kind in (kinds or ())):
            continue
        text = f"{path}{name}={value!r} is not a number of tokens of 1 or more (null for none)"
        reasons.append(Reason("config", text))
    return reasons


def _number_reasons(config: Any, path: str) -> list[Reason]:
    reasons = []
    name, dropout = _first_of(config, "attention_dropout", "attention_probs_dropout_prob")
    if dropout is not None and not (isinstance(dropout, int | float) and 0 <= dropout <= 1):
        reasons.append(Reason("config", f"{path}{name}={dropout!r} is not a probability"))
    name, cap = _first_of(config, "attn_logit_softcapping")
    if cap is not None and not (isinstance(cap, int | float) and cap > 0 and math.isfinite(cap)):
        reasons.append(Reason("config", f"{path}{name}={cap!r} is not a number above 0 (null for none)"))
    return reasons


def _is_uneven(config: Any) -> bool:
    """Whether the heads don't divide the width, and no head dim is given."""
    (_, heads), (_, size) = _first_of(config, *_HEADS), _first_of(config, *_WIDTH)
    known = any(getattr(config, name, None) is not None for name in ("head_dim", "qk_nope_head_dim"))
    return _is_count(heads) and _is_count(size) and not known and bool(size % heads)
