"""``fp8``: attention in FP8 (e4m3) by FlashAttention 3, for inference and, with a true gradient, for training.

Q, K and V are scaled to fp8 per document and KV head, so that no document changes another's scale; the mean of K is
subtracted first (`axattn.backends.varlen_engine.flash_backward`). torchao's quantiser takes whole rows, axattn's
(`axattn.kernels.fp8_quantiser`) documents; both are Triton.

Error on random data with keys far from zero (measured with e4m3 operands and weights, tests/backends/test_fp8.py):
output 4.5 %, gradients 3 %; with ``backward="exact"`` gradients 0.5 %, the error of bf16. A Hadamard rotation changes
neither.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from axattn.backends.base import QUANTISED, Backend, check_gpu, check_library
from axattn.backends.call import AttentionCall
from axattn.backends.flash_calls import layout_of
from axattn.backends.torch_flash import unusable
from axattn.backends.varlen_engine.flash_backward import BACKWARD, Packed, exact_forward, flash_backward
from axattn.backends.varlen_engine.forward_backward import ForwardBackward, PackedForwardBackward, over_packed
from axattn.backends.varlen_engine.packed import one_head_dim, packed_call
from axattn.backends.varlen_engine.per_document import documents_of, mean_of_keys
from axattn.backends.varlen_engine.sinks import with_sinks
from axattn.errors import BackendUnavailableError, Reason
from axattn.hf import integrations
from axattn.kernels.hadamard import hadamard
from axattn.machine.environment import Environment
from axattn.masks.varlen_layout import Layout
from axattn.spec.capability import Capability
from axattn.spec.options import Option, one_of

_INSTALL = "pip install torchao fa3-fwd"
CAPABILITY = dataclasses.replace(
    QUANTISED,
    head_dim_multiple=16,
    notes={
        "": "models load with use_cache=False; generate may still keep a cache",
        "window": "with flash-attn-3 only; fa3-fwd is built without windows",
        "softcap": "in inference only",
    },
)
TORCHAO_LIMIT = 2**31
"""Number of elements above which torchao's quantiser (0.18) overflows: its offsets are int32."""
HADAMARD = Option(
    "hadamard",
    "none",
    'rotate heads so that outliers spread over all channels: "none", "v" (values), "qkv" (all three)',
    one_of("none", "v", "qkv"),
)


def fp8(call: AttentionCall) -> torch.Tensor:
    """FP8 attention; returns ``[B, S, H, Dv]``."""
    layout = layout_of(call)
    if call.sinks is not None:
        return with_sinks(call, layout, _pair(call))
    rotation = BACKEND.option(call, "hadamard")
    exact_backward = BACKEND.option(call, "backward") == "exact"

    def kernel(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
        packed = Packed(cu_q, cu_k, max_q, max_k, layout.causal, layout.window, call.scale)
        arguments = (q, k, v, packed, layout, call.softcap or 0.0, rotation, exact_backward)
        out: torch.Tensor = _Fp8.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's apply has no annotations
        return out

    query, key, value = one_head_dim(call.query, call.key, call.value)
    return packed_call(query, key, value, layout, kernel)[..., : call.value.shape[-1]]


class _Fp8(torch.autograd.Function):
    """Packed FP8 attention over ``[tokens, H, D]``; backward in 16 bit."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: Packed,
        layout: Layout,
        softcap: float,
        rotation: str,
        exact_backward: bool,
    ) -> torch.Tensor:
        out, lse, k = _forward(q, k, v, packed, layout, softcap, rotation)
        if exact_backward:
            ctx.save_for_backward(q, k, v)
        else:
            ctx.save_for_backward(q, k, v, out, lse)
        ctx.packed = packed
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        out, lse = rest or exact_forward(q, k, v, ctx.packed)
        return (*flash_backward(grad, q, k, v, out, lse, ctx.packed), None, None, None, None, None)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed,
    layout: Layout,
    softcap: float,
    rotation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output ``[tokens, H, D]``, logsumexp ``[H, tokens]``, and the keys of its logits."""
    # no smoothing under a softcap, which is not invariant to a shift of the logits
    parts, keys = quantised(q, k, v, layout, rotation, smooth=not softcap)
    out, lse = _attention(parts, packed, softcap)
    out = out.to(q.dtype)
    return out if rotation == "none" else rotated(out), lse, keys


def forward_backward(call: AttentionCall) -> ForwardBackward | None:
    """Its forward and backward as separate functions; None under a softcap, which has no gradient."""
    return None if call.softcap is not None else _pair(call)


def _pair(call: AttentionCall) -> ForwardBackward:
    rotation = BACKEND.option(call, "hadamard")

    def forward(q: Any, k: Any, v: Any, packed: Packed, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, _ = _forward(q, k, v, packed, layout, 0.0, rotation)
        return out, lse

    recompute = exact_forward if BACKEND.option(call, "backward") == "exact" else None
    return over_packed(PackedForwardBackward(forward, smoothed_keys, recompute, mean_of_keys))


Quantised = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k and v in fp8, ``[tokens, H, D]``, and their descale factors, float32 ``[documents, Hkv]``."""


def quantised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, rotation: str, *, smooth: bool
) -> tuple[Quantised, torch.Tensor]:
    """The inputs in fp8, and the keys of the logits in 16 bit: minus their mean if `smooth`, not rotated."""
    from axattn.kernels import fp8_quantiser

    queries, keys = documents_of(layout, q.device)
    by_torchao = layout.whole_rows and max(q.numel(), k.numel()) <= TORCHAO_LIMIT
    if rotation == "qkv":
        q = rotated(q)
    if rotation != "none":
        v = rotated(v)
    kv_heads = k.shape[1]
    if smooth and rotation != "qkv" and not by_torchao:
        k8, k = fp8_quantiser.quantise_smoothed(k, keys)
    else:
        if smooth:
            k = fp8_quantiser.smoothed(k, keys)
        k_in = rotated(k) if rotation == "qkv" else k
        if by_torchao:
            return quantised_rows(q, k_in, v, layout), k
        k8 = fp8_quantiser.quantise(k_in, keys, kv_heads)
    q8, v8 = fp8_quantiser.quantise(q, queries, kv_heads), fp8_quantiser.quantise(v, keys, kv_heads)
    return (q8.values, k8.values, v8.values, q8.undo, k8.undo, v8.undo), k


def smoothed_keys(key: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Keys ``[tokens, Hkv, D]`` minus the mean of each document."""
    from axattn.kernels import fp8_quantiser

    return fp8_quantiser.smoothed(key, documents_of(layout, key.device)[1])


def quantised_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> Quantised:
    """torchao's quantisation per row and KV head: the largest absolute value becomes fp8's largest."""
    quantise = integrations.fp8_quantiser()
    rows = [x.reshape(layout.rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
    q8, k8, v8, *descale = quantise(*rows)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q8, k8, v8)]
    return flat[0], flat[1], flat[2], descale[0], descale[1], descale[2]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` times a Hadamard matrix over the square root of its size: orthogonal, and its own inverse.

    If D is no power of two, it acts on blocks of the largest power of two that divides D.
    """
    size = x.shape[-1] & -x.shape[-1]
    result: torch.Tensor = x.reshape(-1, size) @ (hadamard(size, torch.float32, x.device) / size**0.5).to(x.dtype)
    return result.view(x.shape)


def _attention(parts: Quantised, packed: Packed, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention 3's forward: bf16 ``[tokens, H, D]`` and the logsumexp, float32 ``[H, tokens]``."""
    q, k, v, q_descale, k_descale, v_descale = parts
    out, lse, *_ = varlen_function()(
        q,
        k,
        v,
        cu_seqlens_q=packed.cu_q,
        cu_seqlens_k=packed.cu_k,
        max_seqlen_q=packed.max_q,
        max_seqlen_k=packed.max_k,
        softmax_scale=packed.scale,
        causal=packed.causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=(-1, -1) if packed.window is None or packed.window >= packed.max_k else packed.window_size,
        softcap=softcap,
        return_attn_probs=True,  # returns the logsumexp
    )
    return out, lse


@functools.cache
def varlen_function() -> Callable[..., Any]:
    """``flash_attn_varlen_func`` of the installed FlashAttention 3 package.

    Raises:
        ImportError: it is broken (the planner has checked that it is installed).
        BackendUnavailableError: it returns no logsumexp.
    """
    own = Environment.current().has("flash_attn_3")
    if not own:
        _load_cuda_runtime()
    name = "flash_attn_interface" if own else "fa3_fwd_interface"
    function: Callable[..., Any] = importlib.import_module(name).flash_attn_varlen_func
    if "return_attn_probs" not in inspect.signature(function).parameters:  # hopper/ as of flash-attn 2.8.3
        raise BackendUnavailableError(
            "fp8 can't run on this build of FlashAttention 3",
            [Reason("version", f"{name} returns no logsumexp, which a gradient needs")],
            "Build hopper/ of a newer flash-attention, or uninstall it and pip install fa3-fwd.",
        )
    return function


def _load_cuda_runtime() -> None:
    """With a torch for CUDA 12, load CUDA 13's runtime, which fa3-fwd is linked against, if it is installed."""
    if (torch.version.cuda or "").startswith("13") or importlib.util.find_spec("nvidia") is None:
        return
    spec = importlib.util.find_spec("nvidia.cu13")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        library = Path(folder) / "lib" / "libcudart.so.13"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def probe(environment: Environment) -> list[Reason]:
    """Every reason why a machine can't run fp8 attention."""
    reasons: list[Reason] = []
    check_gpu(reasons, "fp8", environment, minimum_sm=90)
    if environment.sm is not None and environment.sm >= 100:
        text = f"{environment.gpu or 'the GPU'} is sm{environment.sm}, and FlashAttention 3 is built for Hopper (sm90)"
        reasons.append(Reason("gpu", text))
    check_library(reasons, "torch", "torch", environment, "pip install -U torch", "2.11")
    reasons += unusable(environment)  # for backward
    check_library(reasons, "torchao", "torchao", environment, "pip install -U torchao", "0.17")
    check_library(reasons, "triton", "triton", environment, "pip install triton", "3.3")
    if environment.triton_interpret:
        text = "TRITON_INTERPRET=1 is set, and Triton's interpreter truncates where torchao's quantiser rounds"
        reasons.append(Reason("library", text, "unset TRITON_INTERPRET"))
    if not environment.has("flash_attn_3") and not environment.has("fa3_fwd"):
        text = "FlashAttention 3 (flash-attn-3 or fa3-fwd) is not installed"
        reasons.append(Reason("library", text, "pip install fa3-fwd"))
    elif not environment.has("flash_attn_3"):
        found = environment.cuda or ""
        if found and not found.startswith("13") and not environment.has("cuda_runtime_13"):
            text = f"fa3-fwd 0.0.3 is built for CUDA 13 (libcudart.so.13), torch for {found}"
            fix = "pip install nvidia-cuda-runtime, or install a torch build for CUDA 13"
            reasons.append(Reason("library", text, fix))
    return reasons


def _capability(environment: Environment) -> Capability:
    return dataclasses.replace(CAPABILITY, window=True) if environment.has("flash_attn_3") else CAPABILITY


BACKEND = Backend(
    "fp8",
    "FP8 attention: torchao and FlashAttention 3",
    CAPABILITY,
    probe,
    fp8,
    install=_INSTALL,
    on=_capability,
    options=(HADAMARD, BACKWARD),
    patches=("no cache",),
    spans=True,
    forward_backward=forward_backward,
)
BACKENDS = (BACKEND,)
