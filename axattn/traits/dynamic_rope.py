"""Rotary embeddings whose frequencies depend on the highest position in a batch: read from config and modules.

LongRoPE (arXiv:2402.13753; Phi-3, Phi-4) uses its long factors once any row is longer than
``original_max_position_embeddings``; dynamic NTK scales by the longest length so far (``dynamic_rope_update``,
transformers 5.17 and 5.23). In a packed row that may be the length of another document.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from axattn.hf.module_walk import attribute, modules_of

LONGROPE = "longrope"
DYNAMIC = "dynamic"


def by_length(config: Any) -> list[str]:
    """The kinds of such embeddings in a config, for all layers or one layer type; sorted."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [found, *(value for value in found.values() if isinstance(value, dict))]
    kinds = {_base_type(one.get("rope_type", one.get("type", ""))) for one in each}
    return sorted(kinds & {LONGROPE, DYNAMIC})


def limits(model: torch.nn.Module) -> list[int]:
    """The lengths above which frequencies change; empty for most models."""
    return sorted({limit(module, layer) for module, layer in _embeddings(model)})


def rope_scaling_threshold(model: torch.nn.Module) -> int | None:
    """The row length up to which dynamic NTK keeps the original frequencies, None for other models."""
    found = [limit(module, layer) for module, layer in _embeddings(model) if kind(module, layer) == DYNAMIC]
    return min(found, default=None)


def longropes(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that compute LongRoPE."""
    found = {id(module): module for module, layer in _embeddings(model) if kind(module, layer) == LONGROPE}
    return list(found.values())


def kind(module: torch.nn.Module, layer: str | None) -> str:
    """The ``rope_type`` of a rotary embedding.

    Args:
        module: the embedding.
        layer: the layer type, None if all layers share one set of frequencies.
    """
    rope_type: Any = getattr(module, "rope_type", "")
    return _base_type(rope_type.get(layer, "") if isinstance(rope_type, dict) else rope_type)


def limit(module: torch.nn.Module, layer: str | None) -> int:
    """The length up to which the frequencies of an embedding are the original ones; arguments as for `kind`."""
    config: Any = module.config
    if kind(module, layer) == LONGROPE:
        parameters = config.rope_parameters if layer is None else config.rope_parameters[layer]
        return int(parameters["original_max_position_embeddings"])
    length: Any = getattr(module, "original_max_seq_len", config.max_position_embeddings)
    return int(length)


def _embeddings(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str | None]]:
    """The length-dependent embeddings of a model, each once per layer type that it distinguishes."""
    for module in modules_of(model):
        rope_type = attribute(module, "rope_type")
        if rope_type is None or not hasattr(module, "config"):
            continue
        for layer in list(rope_type) if isinstance(rope_type, dict) else [None]:
            if kind(module, layer) in (LONGROPE, DYNAMIC):
                yield module, layer


def _base_type(rope_type: Any) -> str:
    return DYNAMIC if DYNAMIC in str(rope_type) else str(rope_type)
