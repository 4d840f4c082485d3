"""Snapshots: copies of tensors that nothing changes, and what was read from one for as long as it lives.

An operator of a compiled graph can't tell whether a tensor still holds what another layer read from it: Inductor writes
new values into buffers that it passes on as the same object and counts no version, and under ``inference_mode`` tensors
have no version at all (torch 2.13). A copy that an operator of ours has made, and only ever hands to others of ours, is
never written to while they still read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

READS_ON_HOST = (torch.Tag.cudagraph_unsafe,)
"""The tags of operators that read values on the host, or hand on an object: no CUDA graph may replay them."""

_memos: Any = WeakTensorKeyDictionary()  # by object, and a new tensor is never taken for a dead one with its id


@torch.library.custom_op("axattn::snapshot", mutates_args=(), tags=READS_ON_HOST)
def snapshot(x: torch.Tensor) -> torch.Tensor:
    """A copy for operators that read values on the host.

    Args:
        x: any shape and dtype.

    Returns:
        A contiguous tensor of that shape and dtype, another one each time the graph runs.
    """
    copy = x.clone(memory_format=torch.contiguous_format)
    _memos[copy] = {}
    return copy


@snapshot.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def memo_of(x: torch.Tensor) -> dict[Any, Any] | None:
    """What has been read from a snapshot, None for any other tensor: nobody knows what happens to it."""
    found: dict[Any, Any] | None = _memos.get(x)
    return found
