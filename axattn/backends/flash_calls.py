"""Direct calls of FlashAttention 2, 3 and 4, for plans in which only some layers run on one of them.

Where a whole model runs on a flash name Transformers calls the kernel itself; its one process-wide slot for flash
functions would be re-imported at every switch between layers, so mixed plans come here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from axattn.backends import decoding
from axattn.backends.base import on_gpu_of
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine.packed import one_head_dim, packed_call
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf import determinism
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.varlen_layout import Layout, Span

_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


@functools.cache
def varlen_function(version: int) -> Callable[..., Any]:
    """``flash_attn_varlen_func`` of one FlashAttention generation.

    Raises:
        ImportError: the package is absent or broken (the planner has checked that it is there).
    """
    function: Callable[..., Any] = importlib.import_module(_MODULES[version]).flash_attn_varlen_func
    return function


@functools.cache
def takes_deterministic(version: int) -> bool:
    """Whether ``deterministic`` is among its arguments: from flash-attn 2.4.1 on."""
    return "deterministic" in inspect.signature(varlen_function(version)).parameters


@functools.cache
def dense_function(version: int) -> Callable[..., Any]:
    """``flash_attn_func`` of one FlashAttention generation, for whole rows.

    Raises:
        ImportError: as for `varlen_function`.
    """
    function: Callable[..., Any] = importlib.import_module(_MODULES[version]).flash_attn_func
    return function


def flash_2(call: AttentionCall) -> torch.Tensor:
    """FlashAttention 2; returns ``[B, S, H, Dv]``."""
    return _call(call, 2, {"dropout_p": call.dropout, **_softcap(call)}, unlimited=-1)


def flash_3(call: AttentionCall) -> torch.Tensor:
    """FlashAttention 3; returns ``[B, S, H, Dv]``."""
    return _call(call, 3, _softcap(call), unlimited=-1)


def flash_4(call: AttentionCall) -> torch.Tensor:
    """FlashAttention 4 (``flash_attn.cute``); returns ``[B, S, H, Dv]``."""
    options = _softcap(call)
    if call.sinks is not None:
        options["learnable_sink"] = call.sinks.to(call.query.dtype)
    return _call(call, 4, options, unlimited=None)


def _softcap(call: AttentionCall) -> dict[str, Any]:
    return {} if call.softcap is None else {"softcap": call.softcap}


def _call(call: AttentionCall, version: int, options: dict[str, Any], unlimited: int | None) -> torch.Tensor:
    layout = layout_of(call)
    if decoding.serves(call) and not layout.whole_rows:
        return decoding.one_query(call, layout)
    left = unlimited if layout.window is None else layout.window - 1
    options = {
        "softmax_scale": call.scale,
        "causal": layout.causal and layout.q_length > 1,  # of a single query, the last, it says nothing
        "window_size": (left, (unlimited if layout.window is None else 0) if layout.causal else left),
        **options,
    }
    if determinism.preferred(call.extras.get("deterministic")) and takes_deterministic(version):
        options["deterministic"] = True

    def kernel(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
        lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return _output(varlen_function(version)(q, k, v, **lengths, **options))

    query, key, value = one_head_dim(call.query, call.key, call.value)
    if layout.whole_rows:  # strided: a cache is not copied
        with on_gpu_of(query):
            out = _output(dense_function(version)(*(x.transpose(1, 2) for x in (query, key, value)), **options))
    else:
        out = packed_call(query, key, value, layout, kernel)
    return out[..., : call.value.shape[-1]]


def _output(found: Any) -> torch.Tensor:
    out: torch.Tensor = found[0] if isinstance(found, tuple) else found  # FlashAttention 4 returns (out, logsumexp)
    return out


def layout_of(call: AttentionCall) -> Layout:
    """The spans of a call: its mask's, or whole rows where there is no mask."""
    layout = call.mask.layout() if isinstance(call.mask, LazyMask) else None
    if layout is not None:
        return layout
    if call.mask is not None:  # `Need.dense_mask` sends such masks to another kernel
        raise UnsupportedAttentionError("FlashAttention can't serve this call", [Reason("dense_mask", "a dense mask")])
    B, _, S, _ = call.query.shape
    return _whole_rows(B, S, call.key.shape[2], call.causal and S > 1, call.window, call.query.device)


@functools.lru_cache(maxsize=16)
def _whole_rows(rows: int, queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Layout:
    """One object for all layers, and what is made of it once for them: its tensors are on `device`."""
    return Layout((Span(0, rows, 0, queries, 0, keys),), causal, window, rows, queries, keys)
