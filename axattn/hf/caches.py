"""Caches of keys, values and states, recognised by their methods or contents, not by keyword.

A cache filled by a packed row is marked where the mark survives: on its layers, which copies, reorderings and rebuilt
caches keep, and on the keys, from which a new cache may be built. No keywords here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from axattn.hf.torch_internals import require_when_run

PACKED = "_axattn_one_document"
"""Attribute on layers and keys that a packed row has filled: the length of the first document (the shortest of all
rows). A compiled graph stores a tensor, larger than the number of tokens if no row was packed."""
_METHODS = ("get_seq_length", "get_mask_sizes", "update_conv_state", "update_recurrent_state")
"""Methods of Transformers' caches: an object with one of them is a cache (5.17 to 5.24)."""
_DEPTH = 2
"""How deep `caches_in` searches containers: a cache in a dict of states, not in a tree."""


def is_cache(value: Any) -> bool:
    """Whether a value is a cache: it has a method of Transformers' caches, or consists of keys and values by layer
    (``((k, v), ...)``, each ``[B, H, T, D]``)."""
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor | torch.nn.Module):
        return False
    return any(hasattr(value, name) for name in _METHODS) or _is_by_layer(value)


def is_paged(value: Any) -> bool:
    """Whether a value is the cache of Transformers' continuous batching, which separates its requests itself."""
    return type(value).__name__.startswith("Paged")


def is_unpaged_cache(value: Any) -> bool:
    """Whether a value is a cache that returns all keys of a layer, in token order."""
    return is_cache(value) and not is_paged(value)


def caches_in(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The value itself if it is a cache, else the caches in its items (of a tuple, list or mapping) or attributes."""
    if is_cache(value):
        yield value
    elif depth and not isinstance(value, bool | int | float | str | torch.Tensor | torch.nn.Module):
        for inner in _members(value):
            yield from caches_in(inner, depth - 1)


def held_tokens(cache: Any) -> int | torch.Tensor:
    """The number of tokens in a cache; an unread tensor if a static cache counts them."""
    held: int | torch.Tensor = 0
    if hasattr(cache, "get_seq_length"):
        held = cache.get_seq_length()
    elif _is_by_layer(cache):
        held = cache[0][0].shape[-2]
    return held


def cache_length(cache: Any) -> int:
    """`held_tokens` as an int (with a static cache this reads a tensor)."""
    return int(held_tokens(cache))


def is_packed(cache: Any) -> bool:
    """Whether a cache holds tokens of several documents in a row; in a graph this is asserted at run time.

    The mark is removed from a cache that has since been emptied or cropped to its first document.
    """
    if cache is None:
        return False
    layers = getattr(cache, "layers", None)
    if layers and not hasattr(layers[0], PACKED) and type(getattr(layers[0], "keys", None)) is torch.Tensor:
        return False  # all layers are marked, or none
    holders = _holders(cache)
    first_document = keys = None
    for one in holders:
        first_document = getattr(one, PACKED, None)
        keys = one if isinstance(one, torch.Tensor) else getattr(one, "keys", None)
        if first_document is not None or keys is not None:
            break
    if first_document is None:
        return isinstance(keys, PackedKeys) and keys.shape[-2] > 0
    held = _held_tokens(holders)
    if torch.compiler.is_compiling() and (isinstance(first_document, torch.Tensor) or isinstance(held, torch.Tensor)):
        require_when_run(held <= first_document, "this cache was filled by a row of several documents")
    elif bool(held > first_document):
        return True
    for one in holders:
        if hasattr(one, PACKED):
            delattr(one, PACKED)
        if isinstance(getattr(one, "keys", None), PackedKeys):
            one.keys = one.keys.as_subclass(torch.Tensor)
    return False


def mark_packed(cache: Any, first_document: int | torch.Tensor) -> None:
    """Mark a cache as filled by a packed row (in a graph: possibly).

    Args:
        cache: the cache.
        first_document: length of the first document of each row, the shortest of all; a tensor in a graph (`PACKED`).
    """
    holders = _holders(cache)
    for holder in holders:
        setattr(holder, PACKED, first_document)
    if isinstance(first_document, torch.Tensor):
        return
    for holder in holders:
        keys = getattr(holder, "keys", None)
        if isinstance(keys, PackedKeys):
            return
        if type(keys) is torch.Tensor and keys.ndim == 4:
            if not getattr(holder, "is_compileable", False):  # graphs hold the tensors of a static layer
                holder.keys = keys.as_subclass(PackedKeys)
            return


class PackedKeys(torch.Tensor):
    """Keys ``[B, H, T, D]`` of packed rows. Results over the same tokens are `PackedKeys` too, so that a cache filled
    with them is recognised. Otherwise they behave as a tensor; pickling makes them a ``torch.Tensor``."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As for ``torch.Tensor``; a result over other tokens (a slice, scores, an output) is a ``torch.Tensor``."""
        found = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if not isinstance(found, cls):
            return found
        given = (x for one in args for x in (one if isinstance(one, tuple | list) else (one,)))
        tokens = {x.shape[-2:] for x in given if isinstance(x, cls)}
        return found if found.ndim == 4 and found.shape[-2:] in tokens else found.as_subclass(torch.Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedKeys:
        """A copy that is `PackedKeys` too."""
        found: PackedKeys = copy.deepcopy(self.as_subclass(torch.Tensor), memo).as_subclass(PackedKeys)
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As for ``torch.Tensor``."""
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _holders(cache: Any) -> list[Any]:
    """The objects that hold the keys and states of a cache and survive its copy or rebuild: its layers; the keys, if it
    is a tuple; else the cache itself."""
    if isinstance(cache, tuple | list):
        return [one[0] for one in cache] if _is_by_layer(cache) else []
    found: list[Any] = []
    for part in (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None), cache):
        layers = getattr(part, "layers", None)
        if isinstance(layers, list):
            found += layers
    return found or [cache]


def _held_tokens(holders: list[Any]) -> Any:
    """The number of tokens held (a tensor if a static layer counts them); with states only, 0 or a huge number."""
    held = 0
    for one in holders:
        if isinstance(one, torch.Tensor):
            return one.shape[-2]
        if hasattr(one, "get_seq_length"):
            return one.get_seq_length()
        states = getattr(one, "has_previous_state", True)
        if any(states.values()) if isinstance(states, dict) else states:
            held = 2**62
    return held


def _is_by_layer(value: Any) -> bool:
    if not isinstance(value, tuple | list) or not value or not isinstance(value[0], tuple | list):
        return False
    return all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in value[0][:2]) and len(value[0]) > 1


def _members(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).values())
