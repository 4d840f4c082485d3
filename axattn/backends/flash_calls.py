"""Direct calls of FlashAttention 2, 3 and 4, for plans in which only some layers run on one of them.

If a whole model runs on a flash name, Transformers calls the kernel itself. It has one slot for flash functions in the
process and would import them again at every switch between layers, so mixed plans call the kernels here.
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
from axattn.backends.varlen_engine.flash_backward import Packed
from axattn.backends.varlen_engine.forward_backward import PackedForwardBackward, over_packed
from axattn.backends.varlen_engine.packed import one_head_dim, packed_call
from axattn.backends.varlen_engine.sinks import with_sinks
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf import determinism
from axattn.hf.torch_internals import parameters_of
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.varlen_layout import Layout, Span

_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


@functools.cache
def varlen_function(version: int) -> Callable[..., Any]:
    """``flash_attn_varlen_func`` of one FlashAttention generation.

    Raises:
        ImportError: the package is missing or broken (the planner has checked that it is installed).
    """
    function: Callable[..., Any] = importlib.import_module(_MODULES[version]).flash_attn_varlen_func
    return function


@functools.cache
def takes_deterministic(version: int) -> bool:
    """Whether the function takes ``deterministic``: from flash-attn 2.4.1 on."""
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
    if call.sinks is not None and call.sinks.ndim > 1:
        reason = Reason("sinks", "attention sinks per token (it has one per head)")
        raise UnsupportedAttentionError("FlashAttention 4 can't serve this call", [reason], 'Use "auto" or "varlen".')
    if call.sinks is not None:
        options["learnable_sink"] = call.sinks.to(call.query.dtype)
    return _call(call, 4, options, unlimited=None)


def _softcap(call: AttentionCall) -> dict[str, Any]:
    return {} if call.softcap is None else {"softcap": call.softcap}


def _call(call: AttentionCall, version: int, options: dict[str, Any], unlimited: int | None) -> torch.Tensor:
    layout = layout_of(call)
    sinks = call.sinks if version in _LOGSUMEXP else None
    single = call.query.shape[2] == 1 and sinks is not None and call.softcap is None
    if single or (decoding.serves(call) and not layout.whole_rows):
        return decoding.single_query_attention(call, layout)
    left = unlimited if layout.window is None else layout.window - 1
    options = {
        "softmax_scale": call.scale,
        "causal": layout.causal and layout.q_length > 1,  # no effect on a single query, the last
        "window_size": (left, (unlimited if layout.window is None else 0) if layout.causal else left),
        **options,
    }
    if determinism.preferred(call.extras.get("deterministic")) and takes_deterministic(version):
        options["deterministic"] = True
    if sinks is not None:
        return with_sinks(call, layout, over_packed(_LOGSUMEXP[version](options)))

    def kernel(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
        lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return _output(varlen_function(version)(q, k, v, **lengths, **options))

    query, key, value = one_head_dim(call.query, call.key, call.value)
    if layout.whole_rows:  # the dense function takes strides: no copy of a cache
        with on_gpu_of(query):
            out = _output(dense_function(version)(*(x.transpose(1, 2) for x in (query, key, value)), **options))
    else:
        out = packed_call(query, key, value, layout, kernel)
    return out[..., : call.value.shape[-1]]


# ---- forward and backward apart, for sinks ---------------------------------------------------------------------------


def _pair_2(options: dict[str, Any]) -> PackedForwardBackward:
    """``_flash_attn_varlen_forward`` and ``_backward`` (flash-attn 2.8.3, ``flash_attn/flash_attn_interface.py``)."""
    softcap, deterministic = options.get("softcap", 0.0), options.get("deterministic", False)

    def forward(q: Any, k: Any, v: Any, packed: Packed, _: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        out, logsumexp, *_unused = varlen_function(2)(
            q, k, v, packed.cu_q, packed.cu_k, packed.max_q, packed.max_k, return_attn_probs=True, **options
        )
        return out, logsumexp

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, packed: Packed, _: Layout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        run = _private(2, "_flash_attn_varlen_backward")
        inputs = (grad, q, k, v, out, logsumexp, dq, dk, dv)
        lengths = (packed.cu_q, packed.cu_k, packed.max_q, packed.max_k)
        settings = (0.0, packed.scale, options["causal"], *options["window_size"], softcap, None, deterministic)
        run(*inputs, *lengths, *settings)
        return dq, dk, dv

    return PackedForwardBackward(forward, _same_keys, backward=backward)


def _pair_3(options: dict[str, Any]) -> PackedForwardBackward:
    """``_flash_attn_forward`` and ``_flash_attn_backward`` of FlashAttention 3 (``hopper/flash_attn_interface.py``).

    Builds differ: they take the window as a tuple or as two numbers, and ``causal`` or ``is_causal``.
    """
    settings = {**options, "is_causal": options["causal"]}
    settings["window_size_left"], settings["window_size_right"] = options["window_size"]

    def lengths(packed: Packed) -> dict[str, Any]:
        ends = {"cu_seqlens_q": packed.cu_q, "cu_seqlens_k": packed.cu_k}
        return {**ends, "max_seqlen_q": packed.max_q, "max_seqlen_k": packed.max_k}

    def forward(q: Any, k: Any, v: Any, packed: Packed, _: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        run = _private(3, "_flash_attn_forward")
        out, logsumexp, *_unused = run(q, k, v, **_accepted(run, {**settings, **lengths(packed)}, ("q", "k", "v")))
        return out, logsumexp

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, packed: Packed, _: Layout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        run = _private(3, "_flash_attn_backward")
        gradients = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
        inputs = ("dout", "q", "k", "v", "out", "softmax_lse")
        given = _accepted(run, {**settings, **lengths(packed), **gradients}, inputs)
        run(grad, q, k, v, out, logsumexp, **given)
        return gradients["dq"], gradients["dk"], gradients["dv"]

    return PackedForwardBackward(forward, _same_keys, backward=backward)


_LOGSUMEXP: dict[int, Callable[[dict[str, Any]], PackedForwardBackward]] = {2: _pair_2, 3: _pair_3}
"""The versions whose sinks come from their logsumexp; FlashAttention 4 takes them itself."""


def _private(version: int, name: str) -> Callable[..., Any]:
    """A function of the file that defines `varlen_function`."""
    function: Callable[..., Any] = inspect.unwrap(varlen_function(version)).__globals__[name]
    return function


def _same_keys(key: torch.Tensor, _: Layout) -> torch.Tensor:
    return key


def _accepted(function: Any, given: dict[str, Any], positional: tuple[str, ...]) -> dict[str, Any]:
    """The keywords that a function takes, and None for each other parameter without a default."""
    found = {}
    for name, parameter in parameters_of(function).items():
        if name in given:
            found[name] = given[name]
        elif name not in positional and parameter.default is inspect.Parameter.empty:
            found[name] = None
    return found


def _output(found: Any) -> torch.Tensor:
    out: torch.Tensor = found[0] if isinstance(found, tuple) else found  # FlashAttention 4 returns (out, logsumexp)
    return out


def layout_of(call: AttentionCall) -> Layout:
    """The spans of a call: those of its mask, or whole rows without a mask."""
    layout = call.mask.layout() if isinstance(call.mask, LazyMask) else None
    if layout is not None:
        return layout
    if call.mask is not None:  # the planner sends such masks elsewhere (`Need.dense_mask`)
        raise UnsupportedAttentionError("FlashAttention can't serve this call", [Reason("dense_mask", "a dense mask")])
    B, _, S, _ = call.query.shape
    return _whole_rows(B, S, call.key.shape[2], call.causal and S > 1, call.window, call.query.device)


@functools.lru_cache(maxsize=16)
def _whole_rows(rows: int, queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Layout:
    """One object for all layers, which share what it caches; those tensors are on `device`."""
    return Layout((Span(0, rows, 0, queries, 0, keys),), causal, window, rows, queries, keys)
