"""`exact_attention`: runs the calls that a kernel accepts but passes on, such as one query over a cache."""

from __future__ import annotations

import torch

from axattn.backends import sdpa
from axattn.backends.call import AttentionCall
from axattn.backends.eager import eager
from axattn.backends.varlen_engine.packed import over_layout
from axattn.backends.varlen_engine.sinks import exact_with_sinks
from axattn.hf.torch_internals import is_tracing
from axattn.masks.lazy_mask import LazyMask


def exact_attention(call: AttentionCall) -> torch.Tensor:
    """Exact attention of a call without bias or indices; returns ``[B, S, H, Dv]``.

    Torch's kernels have no softcap: a call with one runs on the model's own eager function.
    """
    if call.softcap is not None:
        return eager(call)
    call.ran = "varlen"
    mask, layout = call.mask, None
    if isinstance(mask, LazyMask) and mask.as_flag is None and not call.dropout and not is_tracing():
        layout = mask.layout()
    if layout is None:
        return sdpa.sdpa(call)
    return over_layout(call, layout) if call.sinks is None else exact_with_sinks(call, layout)
