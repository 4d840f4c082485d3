"""``varlen``: variable-length attention with torch's own flash kernels; the cost follows the document lengths.

On a CPU torch's flash op runs document by document (`axattn.backends.varlen_engine.cpu_tiles`); on CUDA
``torch.nn.attention.varlen``. Calls without a variable-length form (an arbitrary mask, dropout, fp32 on CUDA) run on
``sdpa``, which is exact.
"""

from __future__ import annotations

import dataclasses

import torch

from axattn.backends import sdpa, torch_flash
from axattn.backends.base import TORCH_KERNEL, Backend, always_usable
from axattn.backends.call import AttentionCall
from axattn.backends.compiled_ops import varlen_op
from axattn.backends.varlen_engine.forward_backward import ForwardBackward, of_torch
from axattn.backends.varlen_engine.packed import over_layout
from axattn.backends.varlen_engine.sinks import exact_with_sinks
from axattn.errors import Reason
from axattn.hf.torch_internals import is_tracing
from axattn.machine.environment import Environment
from axattn.masks.lazy_mask import LazyMask

CAPABILITY = dataclasses.replace(
    TORCH_KERNEL,
    sinks=True,
    dropout=True,
    dense_mask=True,
    notes={
        "": "packed rows run on FlashAttention 2, or on what the process has activated instead "
        "(torch.nn.attention.activate_flash_attention_impl, which axattn never calls); a plan names it",
        "dense_mask": "through sdpa",
        "dropout": "through sdpa, document by document",
        "sinks": "from the kernel's logsumexp; on AMD GPUs through sdpa",
        "dtypes": "on CUDA, float32 and head dims above 256 go through sdpa, document by document",
    },
)


def varlen(call: AttentionCall) -> torch.Tensor:
    """Attention whose cost follows the document lengths; returns ``[B, S, H, Dv]``."""
    flagged = isinstance(call.mask, LazyMask) and call.mask.as_flag is not None and call.sinks is None
    if call.dropout or not isinstance(call.mask, LazyMask) or flagged:
        return sdpa.sdpa(call)
    if is_tracing():
        return varlen_op.over_documents(call, "varlen")
    layout = call.mask.layout()
    if layout is None:
        return sdpa.sdpa(call)
    return over_layout(call, layout) if call.sinks is None else exact_with_sinks(call, layout)


def forward_backward(call: AttentionCall) -> ForwardBackward | None:
    """Its forward and backward as separate functions if torch's flash kernel runs: on a GPU only for packed or padded
    rows and with sinks (other whole rows run on the fastest kernel that ``F.scaled_dot_product_attention`` finds)."""
    whole = isinstance(call.mask, LazyMask) and call.mask.as_flag is not None and call.sinks is None
    return None if whole and call.query.device.type != "cpu" else of_torch(call)


def probe(environment: Environment) -> list[Reason]:
    """Every reason why a machine can't run it."""
    return [*always_usable(environment), *torch_flash.unusable(environment)]


BACKENDS = (
    Backend(
        "varlen",
        "torch's flash kernels over documents; no extra library",
        CAPABILITY,
        probe,
        varlen,
        is_sdpa=True,
        notice=sdpa.notice,
        runs_on=torch_flash.runs_on,
        forward_backward=forward_backward,
    ),
)
