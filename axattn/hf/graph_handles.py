"""Handles: one-element tensors that refer an operator of a compiled graph to a Python object, even if copied.

A graph takes only tensors and may get copies of them: CUDA graphs copy inputs into their own buffers.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch


class Entry:
    """The object behind a handle.

    Attributes:
        number: unique in the process.
        value: any object.
    """

    __slots__ = ("__weakref__", "number", "value")

    def __init__(self, number: int, value: Any) -> None:
        self.number = number
        self.value = value


_numbers = itertools.count()
_entries: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()


def new_handle(value: Any) -> torch.Tensor:
    """An int64 tensor ``[1]`` in host memory, so that reading it does not synchronise.

    It keeps `value` alive, as does each copy passed to `entry_of` (autograd may keep only the copy).
    """
    entry = Entry(next(_numbers), value)
    _entries[entry.number] = entry
    handle = torch.full((1,), entry.number, dtype=torch.int64, device="cpu")
    handle._axattn_entry = entry  # type: ignore[attr-defined]  # tensors accept attributes
    return handle


def entry_of(handle: torch.Tensor) -> Entry:
    """The entry of a handle or its copy, looked up by number, because a buffer may hold a new number at each call.

    Raises:
        RuntimeError: the entry is gone: a copy that was never passed here outlived the handle.
    """
    number = int(handle)
    entry: Entry | None = getattr(handle, "_axattn_entry", None)
    if entry is None or entry.number != number:
        entry = _entries.get(number)
        if entry is None:
            raise RuntimeError("axattn: the attention mask of this call is gone; run the forward again")
        handle._axattn_entry = entry  # type: ignore[attr-defined]  # tensors accept attributes
    return entry
