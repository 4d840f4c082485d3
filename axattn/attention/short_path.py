"""The short path of a call whose backend would only call ``F.scaled_dot_product_attention``.

The first layer of a model takes the long path (`axattn.attention.interface`) and stores a note on the mask; layers with
the same candidates, shapes and dtypes, of this model or another, read it. All models of a process share the masks of
whole rows, so notes are stored by these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from axattn.backends.sdpa import attention
from axattn.hf.torch_sdpa import avoids_cudnn, takes_grouped_heads
from axattn.masks.lazy_mask import LazyMask
from axattn.planning.routes import Route

_sdpa = torch.nn.functional.scaled_dot_product_attention


class Note(NamedTuple):
    """What the long path stores on a mask.

    Attributes:
        served: name of the backend.
        kernel: takes query, key, value ``[B, H, S, D]`` and ``scale``; returns ``[B, H, S, Dv]``.
    """

    served: str
    kernel: Callable[..., torch.Tensor]


def key_of(mask: LazyMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...] | None:
    """Everything that selects the backend for a call of whole rows; None for other calls and mixed dtypes."""
    if not mask.guarded or mask.as_flag is None or not query.dtype == key.dtype == value.dtype:
        return None
    device, q, k = query.device, query.shape, key.shape
    if (q[2], k[2]) != mask.shape[2:] or torch.is_autocast_enabled(device.type):
        return None
    return (mask.as_flag, q[1], q[3], k[1], value.shape[3], query.dtype, device, torch.is_grad_enabled())


def note_of(
    route: Route, short_key: tuple[Any, ...] | None, mask: LazyMask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Note | None:
    """Store a note on `mask` if the long path has found a backend for `short_key`, else None."""
    served = route.short.get(short_key)
    if served is None:
        return None
    note = Note(served, _kernel(mask, q, k, v))
    mask.notes[route.candidates, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype] = note
    return note


def _kernel(mask: LazyMask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[..., torch.Tensor]:
    causal, single, grouped = mask.as_flag == "causal", q.shape[2] == 1, q.shape[1] != k.shape[1]
    # training=True: the note outlives this forward, and a checkpoint's first run has no gradients
    avoid_cudnn = avoids_cudnn(q.device, k.shape[2], masked=False, single=single, causal=causal, training=True)
    if avoid_cudnn or (grouped and (single or not takes_grouped_heads(q, k, v, None, 0.0, causal))):
        return functools.partial(attention, mask=None, dropout=0.0, causal=causal)
    return functools.partial(_sdpa, is_causal=causal, enable_gqa=grouped)
