"""``xformers``: memory-efficient attention, every call as one packed row with a block-diagonal bias.

Scale, dropout, causality (bottom-right, as decoding needs), window and documents are all passed explicitly; rows and
padding become blocks, because the library's block-diagonal biases need batch 1.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
from packaging.version import Version

from axattn.backends import decoding
from axattn.backends.base import HALVES, Backend, check_gpu, check_library
from axattn.backends.call import AttentionCall
from axattn.backends.flash_calls import layout_of
from axattn.backends.varlen_engine.flash_backward import Packed
from axattn.backends.varlen_engine.forward_backward import PackedForwardBackward, over_packed
from axattn.backends.varlen_engine.packed import one_head_dim, packed_call, span_lengths
from axattn.backends.varlen_engine.sinks import with_sinks
from axattn.errors import Reason
from axattn.machine.environment import Environment
from axattn.masks.varlen_layout import Layout
from axattn.spec.capability import Capability, Refused

_INSTALL = "pip install xformers"
_BOTH_WAYS = ("window", "bidirectional")
_NO_BACKWARD = "has no backward for it: its memory-efficient kernel refuses windows there"
_VARIES = "runs FlashAttention's non-deterministic backward there"
_ONE_WAY = "has bidirectional windows in FlashAttention only, which does not run there"
_NO_LOGSUMEXP = "serves sinks in FlashAttention only, which does not run there"
_SINKS = (
    Refused("serves no dropout with sinks", ("sinks", "dropout")),
    Refused("has sinks for causal windows only", ("sinks", *_BOTH_WAYS)),
)
CAPABILITY = Capability(
    devices=frozenset({"cuda"}),
    dtypes=HALVES | {"float32"},
    head_dim_multiple=8,
    value_dim_differs=True,
    value_dim_padded=True,
    grouped_heads=True,
    causal=True,
    bidirectional=True,
    window=True,
    chunk=True,
    sinks=True,
    dropout=True,
    padding=True,
    segments=True,
    stems=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
    traced=True,
    refuses=(
        *_SINKS,
        Refused(_NO_LOGSUMEXP, ("sinks",), dtypes=frozenset({"float32"})),
        Refused(_NO_LOGSUMEXP, ("sinks",), dtypes=HALVES, head_dims=(257, None)),
        Refused(_NO_BACKWARD, ("window", "gradient"), dtypes=frozenset({"float32"})),
        Refused(_NO_BACKWARD, ("window", "gradient"), dtypes=HALVES, head_dims=(257, None)),
        Refused(_ONE_WAY, _BOTH_WAYS, dtypes=frozenset({"float32"})),
        Refused(_ONE_WAY, _BOTH_WAYS, dtypes=HALVES, head_dims=(257, None)),
        Refused(_VARIES, ("deterministic",), dtypes=HALVES, head_dims=(1, 256)),
    ),
    notes={
        "window": "bidirectional (encoders): one call per document",
        "": "on Turing no bf16; on Blackwell no fp32, and head dims up to 256",
    },
)
"""What xformers 0.0.35 (``xformers/ops/fmha``) finds an operator for on sm80 and sm90: FlashAttention in 16 bit up to
head dim 256, torch's memory-efficient kernel for the rest. ``tests/real`` checks it against the library."""
_BEFORE_AMPERE = dataclasses.replace(
    CAPABILITY,
    dtypes=frozenset({"float16", "float32"}),
    sinks=False,
    refuses=(Refused(_NO_BACKWARD, ("window", "gradient")), Refused(_ONE_WAY, _BOTH_WAYS)),
)
_AFTER_HOPPER = dataclasses.replace(
    CAPABILITY, dtypes=HALVES, max_head_dim=256, refuses=(*_SINKS, Refused(_VARIES, ("deterministic",)))
)
"""Its memory-efficient operator stops at sm90."""


def _capability(environment: Environment) -> Capability:
    sm = environment.sm or 80
    if sm < 80:
        return _BEFORE_AMPERE
    served = CAPABILITY if sm <= 90 else _AFTER_HOPPER
    if sm in (80, 90):
        return served
    # With dropout above head dim 192 FlashAttention's backward needs more than the 99 KB of shared memory of sm86, sm89
    # and sm120: no kernel runs, and the gradients are uninitialised memory (flash-attn 2.8.3,
    # flash_bwd_launch_template.h). xformers requires sm80 or sm90 above 224, but does not check it before its backward.
    smallest = 225 if 100 <= sm < 120 else 193
    why = "has no backward with dropout for it on this GPU"
    no_backward = Refused(why, ("dropout", "gradient"), dtypes=HALVES, head_dims=(smallest, 256))
    return dataclasses.replace(served, refuses=(*served.refuses, no_backward))


def xformers(call: AttentionCall) -> torch.Tensor:
    """Memory-efficient attention; returns ``[B, S, H, Dv]``."""
    layout = layout_of(call)
    if decoding.serves(call) or (call.sinks is not None and call.query.shape[2] == 1):
        return decoding.single_query_attention(call, layout)
    if call.sinks is not None:
        return with_sinks(call, layout, over_packed(_PAIR))
    memory_efficient_attention = _library().memory_efficient_attention
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any) -> torch.Tensor:
        q, k, v = grouped(q, k, v, gradient)
        out: torch.Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, p=call.dropout, scale=call.scale)
        return out.flatten(2, -2)[0]

    def kernel(q: Any, k: Any, v: Any, *_: Any) -> torch.Tensor:
        q, k, v = q[None], k[None], v[None]
        if layout.causal or layout.window is None:
            return run(q, k, v, _bias(layout, call.query.device))
        blocks = _blocks(layout, q, k, v)
        return torch.cat([run(q1, k1, v1, bidirectional_window(layout)) for q1, k1, v1 in blocks])

    query, key, value = one_head_dim(call.query, call.key, call.value)
    return packed_call(query, key, value, layout, kernel)[..., : call.value.shape[-1]]


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[tokens, H, D]`` and logsumexp ``[H, tokens]``."""
    run = _library().memory_efficient_attention_forward_requires_grad
    inputs = grouped(q[None], k[None], v[None], gradient=True)
    out, logsumexp = run(*inputs, attn_bias=_bias(layout, q.device), scale=packed.scale)
    return out[0], logsumexp[0, :, : q.shape[0]]


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    packed: Packed,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `_forward`; those of repeated KV heads are added up in float32."""
    run = _library().memory_efficient_attention_backward
    inputs = grouped(q[None], k[None], v[None], gradient=True)
    saved = (grad[None], out[None], logsumexp[None])
    dq, dk, dv = run(*saved, *inputs, attn_bias=_bias(layout, q.device), scale=packed.scale)
    tokens, kv_heads, size = k.shape
    if kv_heads != q.shape[1]:
        dk, dv = (x.reshape(tokens, kv_heads, -1, size).sum(2, dtype=torch.float32).to(k.dtype) for x in (dk, dv))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


_PAIR = PackedForwardBackward(_forward, lambda key, _: key, backward=_backward)


def _bias(layout: Layout, device: torch.device) -> Any:
    """`block_diagonal`, made once for all layers that share a layout."""
    return layout.kept("xformers", lambda: block_diagonal(layout, device))


def _library() -> Any:
    """``xformers.ops``; with a torch for CUDA 13, CUDA 12's runtime is loaded first if it is installed."""
    if (torch.version.cuda or "").startswith("13") and "xformers.ops" not in sys.modules:
        spec = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") else None
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            library = Path(folder) / "lib" / "libcudart.so.12"
            if library.exists():
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("xformers.ops")


def grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[1, tokens, H, D]`` with fewer KV heads, in a form that the library takes.

    Its grouped form ``[1, tokens, Hkv, H / Hkv, D]`` has no backward, so keys and values are repeated in training.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads == kv_heads:
        return query, key, value
    group = heads // kv_heads
    if gradient:
        return query, key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    wide = [x[:, :, :, None].expand(*x.shape[:3], group, x.shape[3]) for x in (key, value)]
    return query.reshape(1, -1, kv_heads, group, query.shape[3]), wide[0], wide[1]


def block_diagonal(layout: Layout, device: torch.device) -> Any:
    """The library's bias for the spans of a layout, causal masks aligned bottom-right."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    q_lengths, k_lengths = span_lengths(layout)
    bias = BlockDiagonalMask.from_seqlens(q_lengths, k_lengths, device=device)
    if not layout.causal:
        return bias
    if layout.window is None:
        return bias.make_causal_from_bottomright()
    return bias.make_local_attention_from_bottomright(layout.window)


def bidirectional_window(layout: Layout) -> Any:
    """The library's bias for a bidirectional window over one span: it has no block-diagonal one."""
    from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask

    reach = cast("int", layout.window) - 1
    return LocalAttentionFromBottomRightMask(window_left=reach, window_right=reach)


def _blocks(
    layout: Layout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Query, key and value of each sequence."""
    q_lengths, k_lengths = span_lengths(layout)
    keys = zip(torch.split(k, k_lengths, 1), torch.split(v, k_lengths, 1), strict=True)
    return [(query, *pair) for query, pair in zip(torch.split(q, q_lengths, 1), keys, strict=True)]


_FLASH_ATTN = Version("2.7.1"), Version("2.8.4")
"""The oldest and the newest flash-attn that xformers 0.0.35 imports (``xformers/ops/fmha/flash.py``)."""
_UNCHECKED = "XFORMERS_IGNORE_FLASH_VERSION_CHECK"


def _probe(environment: Environment) -> list[Reason]:
    reasons: list[Reason] = []
    check_gpu(reasons, "xformers", environment, minimum_sm=70)
    check_library(reasons, "xformers", "xformers", environment, _INSTALL, "0.0.35")
    if environment.has("xformers"):
        if environment.has("flash_attn_4") and not environment.has("flash_attn"):
            text = "with FlashAttention 4 but not 2 installed, xformers 0.0.35 fails to import"
            reasons.append(Reason("library", text, "pip uninstall flash-attn-4, or install flash-attn as well"))
        flash = environment.version("flash_attn")
        if flash is not None and not _FLASH_ATTN[0] <= flash <= _FLASH_ATTN[1] and os.environ.get(_UNCHECKED) != "1":
            takes = f"{_FLASH_ATTN[0]} to {_FLASH_ATTN[1]}"
            text = f"with flash-attn {flash} installed, xformers 0.0.35 fails to import (it takes {takes})"
            fix = f'pip install "flash-attn>={_FLASH_ATTN[0]},<={_FLASH_ATTN[1]}", or set {_UNCHECKED}=1'
            reasons.append(Reason("library", text, fix))
        if (environment.cuda or "").startswith("13") and not environment.has("cuda_runtime_12"):
            text = "xformers is built for CUDA 12, torch for CUDA 13: without CUDA 12's runtime it has no kernels"
            reasons.append(Reason("library", text, "pip install nvidia-cuda-runtime-cu12"))
    return reasons


BACKENDS = (
    Backend(
        "xformers",
        "xformers memory-efficient attention",
        CAPABILITY,
        _probe,
        xformers,
        install=_INSTALL,
        spans=True,
        on=_capability,
    ),
)
