"""`exactly`: what a kernel hands on that it serves in name only, such as one query over a cache. Drops nothing."""

from __future__ import annotations

import torch

from axattn.backends import sdpa
from axattn.backends.call import AttentionCall
from axattn.backends.eager import eager
from axattn.backends.varlen_engine.packed import over_layout
from axattn.hf.torch_internals import is_tracing
from axattn.masks.lazy_mask import LazyMask


def exactly(call: AttentionCall) -> torch.Tensor:
    """Exact attention of a call without sinks, bias or indices; returns ``[B, S, H, Dv]``.

    Torch's kernels have no softcap and would drop it: under one the model's own eager function runs.
    """
    if call.softcap is not None:
        return eager(call)
    call.ran = "varlen"
    mask, layout = call.mask, None
    if isinstance(mask, LazyMask) and mask.as_flag is None and not call.dropout and not is_tracing():
        layout = mask.layout()
    return sdpa.sdpa(call) if layout is None else over_layout(call, layout)
