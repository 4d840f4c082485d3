"""Handles: tensors of one number that lead an operator of a compiled graph to a Python object, from copies too.

A graph takes tensors only, and may be handed copies of them: CUDA graphs copy inputs into buffers of their own.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch


class Entry:
    """What one number leads to.

    Attributes:
        number: never used twice in a process.
        value: any object.
    """

    __slots__ = ("__weakref__", "number", "value")

    def __init__(self, number: int, value: Any) -> None:
        self.number = number
        self.value = value


_numbers = itertools.count()
_entries: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()


def new_handle(value: Any) -> torch.Tensor:
    """An int64 tensor ``[1]`` in the host's memory, where reading it waits for nothing.

    It keeps `value` alive, as does each copy once `entry_of` has seen it (autograd may keep that one alone).
    """
    entry = Entry(next(_numbers), value)
    _entries[entry.number] = entry
    handle = torch.full((1,), entry.number, dtype=torch.int64, device="cpu")
    handle._axattn_entry = entry  # type: ignore[attr-defined]  # tensors take attributes
    return handle


def entry_of(handle: torch.Tensor) -> Entry:
    """The entry behind a handle or a copy of one, by its number: a buffer may hold another than at the last call.

    Raises:
        RuntimeError: nothing is left of it: a copy was kept, unseen by any operator, longer than the handle.
    """
    number = int(handle)
    entry: Entry | None = getattr(handle, "_axattn_entry", None)
    if entry is None or entry.number != number:
        entry = _entries.get(number)
        if entry is None:
            raise RuntimeError("axattn: the attention mask of this call is gone; run the forward again")
        handle._axattn_entry = entry  # type: ignore[attr-defined]  # tensors take attributes
    return entry
