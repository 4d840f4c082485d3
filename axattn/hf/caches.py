"""Caches of keys, values and states, known by what they are and not by the keyword that holds them.

What a row of several documents leaves in one is marked where it can't be lost: on its layers, which copies, reorderings
and rebuilt caches keep, and on keys, for a cache that is made of these. No keywords here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from axattn.hf.torch_internals import require_when_run

PACKED = "_axattn_one_document"
"""Attribute on what a row of several documents has filled: how many of its first tokens are of one document (the fewest
of all rows); from a compiled graph a tensor, more than there are where no row was packed."""
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


def held_tokens(cache: Any) -> int | torch.Tensor:
    """How many tokens a cache holds: a tensor where a static cache counts them, which is not read."""
    held: int | torch.Tensor = 0
    if hasattr(cache, "get_seq_length"):
        held = cache.get_seq_length()
    elif _is_by_layer(cache):
        held = cache[0][0].shape[-2]
    return held


def cache_length(cache: Any) -> int:
    """`held_tokens` as a number (in a graph with a static cache a tensor's value is read)."""
    return int(held_tokens(cache))


def is_packed(cache: Any) -> bool:
    """Whether a cache holds tokens of several documents in a row; in a graph that is asserted when it runs.

    One that has been emptied since, or cut to its first document, is as good as new: its mark is taken off.
    """
    if cache is None:
        return False
    layers = getattr(cache, "layers", None)
    if layers and not hasattr(layers[0], PACKED) and type(getattr(layers[0], "keys", None)) is torch.Tensor:
        return False  # all layers are marked, or none
    holders = _holders(cache)
    alone = keys = None
    for one in holders:
        alone = getattr(one, PACKED, None)
        keys = one if isinstance(one, torch.Tensor) else getattr(one, "keys", None)
        if alone is not None or keys is not None:
            break
    if alone is None:
        return isinstance(keys, PackedKeys) and keys.shape[-2] > 0
    held = _held_tokens(holders)
    if torch.compiler.is_compiling() and (isinstance(alone, torch.Tensor) or isinstance(held, torch.Tensor)):
        require_when_run(held <= alone, "this cache was filled by a row of several documents")
    elif bool(held > alone):
        return True
    for one in holders:
        if hasattr(one, PACKED):
            delattr(one, PACKED)
        if isinstance(getattr(one, "keys", None), PackedKeys):
            one.keys = one.keys.as_subclass(torch.Tensor)
    return False


def mark_packed(cache: Any, alone: int | torch.Tensor) -> None:
    """Note that a row of several documents (in a graph: that it may) has filled a cache.

    Args:
        cache: it.
        alone: how many tokens from the start of each row are of one document; a tensor in a graph (`PACKED`).
    """
    holders = _holders(cache)
    for holder in holders:
        setattr(holder, PACKED, alone)
    if isinstance(alone, torch.Tensor):
        return
    for holder in holders:
        keys = getattr(holder, "keys", None)
        if isinstance(keys, PackedKeys):
            return
        if type(keys) is torch.Tensor and keys.ndim == 4:
            if not getattr(holder, "is_compileable", False):  # graphs know the tensors of a static layer
                holder.keys = keys.as_subclass(PackedKeys)
            return


class PackedKeys(torch.Tensor):
    """Keys ``[B, H, T, D]`` of rows of several documents: what is made of them with the same tokens is that too, so
    that a cache that is filled with them is known. Nobody is to see a difference: pickled they are a plain tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As a tensor's; of another shape (a cut, scores, an output) the result is a plain tensor."""
        found = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch's
        if not isinstance(found, cls):
            return found
        given = (x for one in args for x in (one if isinstance(one, tuple | list) else (one,)))
        tokens = {x.shape[-2:] for x in given if isinstance(x, cls)}
        return found if found.ndim == 4 and found.shape[-2:] in tokens else found.as_subclass(torch.Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedKeys:
        """Packed keys too."""
        found: PackedKeys = copy.deepcopy(self.as_subclass(torch.Tensor), memo).as_subclass(PackedKeys)
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain tensor's."""
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's


def _holders(cache: Any) -> list[Any]:
    """What holds the keys and states of a cache, and stays when that is copied or rebuilt: its layers; the keys, where
    it is a tuple of them; else itself."""
    if isinstance(cache, tuple | list):
        return [one[0] for one in cache] if _is_by_layer(cache) else []
    found: list[Any] = []
    for part in (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None), cache):
        layers = getattr(part, "layers", None)
        if isinstance(layers, list):
            found += layers
    return found or [cache]


def _held_tokens(holders: list[Any]) -> Any:
    """How many tokens are held (a tensor where a static layer counts them); of states alone is known whether any."""
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


def _held(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).values())
