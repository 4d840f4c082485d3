"""Caches of keys, values and states, known by what they are and not by the keyword that holds them.

What a row of several documents leaves in one is marked on the cache itself. No keywords here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

PACKED = "_axattn_packed"
"""Attribute on a cache that a row of several documents has filled: True, or a bool tensor from a compiled graph."""
_METHODS = ("get_seq_length", "get_mask_sizes", "update_conv_state", "update_recurrent_state")
"""What Transformers' caches answer to: one of them makes an object a cache (5.17 to 5.24)."""
_DEPTH = 2
"""How deep `caches_in` looks into containers: a cache in a dict of states, not in a tree."""


def is_cache(value: Any) -> bool:
    """Whether a value is a cache: it answers to a method of Transformers' caches, or is made of keys and values by
    layer (``((k, v), ...)``, each ``[B, H, T, D]``)."""
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor | torch.nn.Module):
        return False
    return any(hasattr(value, name) for name in _METHODS) or _is_by_layer(value)


def is_paged(value: Any) -> bool:
    """Whether a value is the cache of Transformers' continuous batching, which keeps its requests apart itself."""
    return type(value).__name__.startswith("Paged")


def is_unpaged_cache(value: Any) -> bool:
    """Whether a value is a cache that gives an attention module all its keys, in the order of tokens."""
    return is_cache(value) and not is_paged(value)


def caches_in(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The caches that a value is or holds: in a tuple, list, mapping or dataclass, or as an attribute of an object."""
    if is_cache(value):
        yield value
    elif depth and not isinstance(value, bool | int | float | str | torch.Tensor | torch.nn.Module):
        for inner in _held(value):
            yield from caches_in(inner, depth - 1)


def cache_length(cache: Any) -> int:
    """How many tokens a cache holds (in a graph with a static cache: a tensor's value, which is read)."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if _is_by_layer(cache):
        return int(cache[0][0].shape[-2])
    return 0


def is_packed(cache: Any) -> bool:
    """Whether a row of several documents has filled a cache."""
    return cache is not None and bool(getattr(cache, PACKED, False))


def mark_packed(cache: Any, packed: bool | torch.Tensor) -> None:
    """Note that a row of several documents (in a graph: that it may) has filled a cache."""
    if not isinstance(cache, tuple | list):  # Transformers returns none of those any more
        setattr(cache, PACKED, packed)


def _is_by_layer(value: Any) -> bool:
    if not isinstance(value, tuple | list) or not value or not isinstance(value[0], tuple | list):
        return False
    return all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in value[0][:2]) and len(value[0]) > 1


def _held(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).values())
