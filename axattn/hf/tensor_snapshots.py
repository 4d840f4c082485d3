"""Snapshots: immutable copies of tensors, with memos of the values read from them.

An operator of a compiled graph can't know whether a tensor still holds the values that another layer read: Inductor
writes new values into reused buffers without counting versions, and under ``inference_mode`` tensors have no version
(torch 2.13). A copy that an axattn operator makes and passes only to other axattn operators is not written to while
they read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

READS_ON_HOST = (torch.Tag.cudagraph_unsafe,)
"""Tags of operators that read values on the host or pass on objects: no CUDA graph may replay them."""

_memos: Any = WeakTensorKeyDictionary()  # keyed by object, safe against reused ids


@torch.library.custom_op("axattn::snapshot", mutates_args=(), tags=READS_ON_HOST)
def snapshot(x: torch.Tensor) -> torch.Tensor:
    """A copy for operators that read values on the host.

    Args:
        x: any shape and dtype.

    Returns:
        A contiguous tensor of that shape and dtype, a new one each time the graph runs.
    """
    copy = x.clone(memory_format=torch.contiguous_format)
    _memos[copy] = {}
    return copy


@snapshot.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def memo_of(x: torch.Tensor) -> dict[Any, Any] | None:
    """The memo of a snapshot (values read from it); None for any other tensor, which may change."""
    found: dict[Any, Any] | None = _memos.get(x)
    return found
