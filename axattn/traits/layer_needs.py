"""Reads what each attention layer of a model needs from its Transformers config alone: no weights, no model object."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from axattn.spec.capability import Need


@dataclass(frozen=True, slots=True)
class LayerNeed:
    """The requirements of one layer.

    Attributes:
        path: the sub-config, ``""`` for the model's own config, ``"text_config"``, ``"a.b"`` when nested.
        index: layer number within that config.
        kind: Transformers' layer type (``full_attention``, ``sliding_attention``, ...).
        need: its `Need`.
    """

    path: str
    index: int
    kind: str
    need: Need

    @property
    def name(self) -> str:
        """For messages: ``text_config layer 3``."""
        return f"{self.path} layer {self.index}".strip()


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """The requirements of a model.

    Attributes:
        model: class name or model type, for messages.
        layers: every attention layer found.
        paths: every config path of the model, ``""`` first.
        unknown: paths whose config doesn't describe attention; their calls are checked one by one.
    """

    model: str
    layers: tuple[LayerNeed, ...]
    paths: tuple[str, ...]
    unknown: tuple[str, ...]


def model_needs(config: Any, model: str = "", copied: Iterable[tuple[str, Any, int]] = ()) -> ModelNeeds:
    """The needs of every attention layer that a config describes.

    Args:
        config: a ``PreTrainedConfig``.
        model: name for messages; the config's model type if empty.
        copied: path, config and layer number of attention modules that read a copy of a config.
    """
    layers: list[LayerNeed] = []
    paths: list[str] = []
    unknown: list[str] = []
    for path, inner in sub_configs(config):
        paths.append(path)
        found = _layers(path, inner)
        layers += found
        if not found and not inner.sub_configs:
            unknown.append(path)
    apart = [layer for path, inner, index in copied for layer in _layer_of_copy(path, inner, index)]
    if apart:
        layers = sorted(dict.fromkeys((*layers, *apart)), key=lambda layer: (paths.index(layer.path), layer.index))
    return ModelNeeds(model or config.model_type, tuple(layers), tuple(paths), tuple(unknown))


def sub_configs(config: Any, path: str = "") -> list[tuple[str, Any]]:
    """``(path, config)`` of a config and every config inside it, outermost first."""
    found = [(path, config)]
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if inner is not None and hasattr(inner, "sub_configs"):
            found += sub_configs(inner, f"{path}.{key}" if path else key)
    return found


def _layers(path: str, config: Any) -> list[LayerNeed]:
    count = _first(config, "num_hidden_layers", "depth", "num_layers", "encoder_layers")
    if not isinstance(count, int):
        return []
    source = _modeling_names(config)
    kinds = getattr(config, "layer_types", None) or [_default_kind(config)] * count
    by_kind: dict[str, Need | None] = {}  # layers of one kind have equal needs unless configs differ per layer
    found = []
    for index, kind in enumerate(kinds):
        if kind.startswith("linear") or not ("attention" in kind or kind in _OTHER_ATTENTION):
            continue
        if kind not in by_kind or _layer_config(config, index) is not config:
            by_kind[kind] = _layer_need(_layer_config(config, index), kind, source)
        need = by_kind[kind]
        if need is not None:
            found.append(LayerNeed(path, index, kind, need))
    return found


def _layer_of_copy(path: str, config: Any, index: int) -> list[LayerNeed]:
    """The layer with this index; if all layers have equal needs, also for the config of a model with fewer layers."""
    layers = _layers(path, config)
    if len({(layer.kind, layer.need) for layer in layers}) == 1:
        return [replace(layers[0], index=index)]
    return [layer for layer in layers if layer.index == index]


_OTHER_ATTENTION = ("hybrid", "hybrid_sliding", "minimax_m3_sparse")


def _layer_config(config: Any, index: int) -> Any:
    """The config of one layer; Gemma 4's global layers have head dims of their own (``per_layer_config``)."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _layer_need(config: Any, kind: str, source: _SourceNames) -> Need | None:
    heads = _first(config, "num_attention_heads", "num_heads", "encoder_attention_heads")
    size = _first(config, "hidden_size", "d_model", "embed_dim")
    if not isinstance(heads, int) or not heads:
        return None
    head_dim = _first(config, "head_dim") or (size // heads if isinstance(size, int) else None)
    value_dim = head_dim
    nope, rope = _first(config, "qk_nope_head_dim"), _first(config, "qk_rope_head_dim")
    if isinstance(nope, int) and isinstance(rope, int):  # multi-head latent attention
        head_dim, value_dim = nope + rope, _first(config, "v_head_dim") or nope + rope
    return Need(
        head_dim=head_dim,
        value_dim=value_dim,
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads") or heads,
        causal=_is_causal(config, source),
        window=_first(config, "sliding_window") if kind == "sliding_attention" else None,
        chunk=_first(config, "attention_chunk_size") if kind == "chunked_attention" else None,
        softcap=_first(config, "attn_logit_softcapping") if "softcap" in source.keywords else None,
        sinks=bool({"s_aux", "sinks"} & source.keywords),
        bias="position_bias" in source.keywords,
        sparse=_selects(config, kind, source),
        dropout=_dropout(config),
    )


def _selects(config: Any, kind: str, source: _SourceNames) -> bool:
    """Whether an indexer selects the keys of a layer; if layer types mark such layers, only those count."""
    if "block_indices" in source.keywords:
        return kind == "minimax_m3_sparse"
    kinds = getattr(config, "layer_types", None) or ()
    return "indices" in source.keywords and (kind == "indexed_attention" or "indexed_attention" not in kinds)


def _default_kind(config: Any) -> str:
    if _first(config, "sliding_window") and getattr(config, "use_sliding_window", True):
        return "sliding_attention"
    return "chunked_attention" if _first(config, "attention_chunk_size") else "full_attention"


_BIDIRECTIONAL = "create_bidirectional_mask"
_BY_OPTION = "use_bidirectional_attention"
"""Gemma 3 reads this setting where it makes its masks; Gemma 1 and 2 only pass it on, and eager is causal."""
_CAUSAL_MASKS = {"create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"}
"""RecurrentGemma makes only the second."""


def _is_causal(config: Any, source: _SourceNames) -> bool:
    if getattr(config, "is_causal", None) is False:
        return False
    if any(tower in type(config).__name__ for tower in ("Vision", "Audio", "Speech")):
        return False
    masks = source.masks.get(type(config).__name__) or frozenset().union(*source.masks.values())
    if _BY_OPTION in masks and getattr(config, _BY_OPTION, None) in (True, "all"):  # "vision": images alone
        return False
    if masks & _CAUSAL_MASKS:
        return bool(getattr(config, "is_decoder", False)) if _BIDIRECTIONAL in masks else True
    return not source.readable  # a file we can't read: assume the common case


def _dropout(config: Any) -> float:
    value = _first(config, "attention_dropout", "attention_probs_dropout_prob")
    return float(value) if isinstance(value, int | float) else 0.0


def _first(config: Any, *names: str) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


@dataclass(frozen=True, slots=True)
class _SourceNames:
    """What a modeling file says of its attention.

    Attributes:
        keywords: what it passes to the attention function.
        masks: by the name of a config class, the functions of Transformers that make the masks of self-attention in the
            classes that take such a config, and `_BY_OPTION` if these read it; ``""`` for other code.
        readable: its source was found.
    """

    keywords: frozenset[str]
    masks: dict[str, frozenset[str]]
    readable: bool = True


def _modeling_names(config: Any) -> _SourceNames:
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    return _read_names(module)


@functools.cache
def _read_names(module: str) -> _SourceNames:
    try:
        source = inspect.getsource(sys.modules.get(module) or importlib.import_module(module))
    except (ImportError, OSError, TypeError):
        return _SourceNames(frozenset(), {}, readable=False)
    tree = ast.parse(source)
    keywords = {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface"
        for keyword in node.keywords
        if keyword.arg is not None
    }
    masks: dict[str, set[str]] = {}
    for part in tree.body:
        made = _mask_functions(part)
        for name in _config_classes(part) or {""}:
            masks.setdefault(name, set()).update(made)
    return _SourceNames(frozenset(keywords), {name: frozenset(made) for name, made in masks.items() if made})


def _mask_functions(part: ast.stmt) -> set[str]:
    """The functions with which a part of a file makes masks; not those of cross-attention, which have the hidden states
    of an encoder (GPT-2 has both)."""
    crossing = {
        id(node.func)
        for node in ast.walk(part)
        if isinstance(node, ast.Call) and any(keyword.arg == "encoder_hidden_states" for keyword in node.keywords)
    }
    names = {node.id for node in ast.walk(part) if isinstance(node, ast.Name) and id(node) not in crossing}
    found = names & {*_CAUSAL_MASKS, _BIDIRECTIONAL}
    reads = found and any(isinstance(node, ast.Attribute) and node.attr == _BY_OPTION for node in ast.walk(part))
    return found | {_BY_OPTION} if reads else found


def _config_classes(part: ast.stmt) -> set[str]:
    """The config classes that a class is annotated with: ``config: GPT2Config``."""
    if not isinstance(part, ast.ClassDef):
        return set()
    noted = [n.annotation for n in ast.walk(part) if isinstance(n, ast.arg) and n.arg == "config"]
    noted += [
        n.annotation
        for n in part.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.target.id == "config"
    ]
    return {n.id for found in noted if found is not None for n in ast.walk(found) if isinstance(n, ast.Name)}
