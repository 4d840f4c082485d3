"""``sage``: SageAttention's INT8 attention by axattn's Triton kernel or the ``sageattention`` library, with a gradient.

axattn's kernel (`axattn.kernels.int8_attention`) serves packed documents, windows and head dims up to 256, and returns
the logsumexp that a true gradient needs. The library serves causal self-attention of head dims 64 and 128; it has no
gradient and no logsumexp, so backward recomputes the exact output. A single query (decoding) runs on `varlen`, because
quantising the cache again for every token is no faster.

Error with keys far from zero (tests/backends/test_sage.py, measured in Triton's interpreter): output 0.6-0.8 %,
gradients 1 %.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import torch

from axattn.backends.base import HALVES, QUANTISED, Backend, check_gpu, check_library
from axattn.backends.call import AttentionCall
from axattn.backends.exact_fallback import exact_attention
from axattn.backends.flash_calls import layout_of
from axattn.backends.torch_flash import unusable
from axattn.backends.varlen_engine.flash_backward import BACKWARD, Packed, exact_forward, flash_backward
from axattn.backends.varlen_engine.forward_backward import ForwardBackward, PackedForwardBackward, over_packed
from axattn.backends.varlen_engine.packed import one_head_dim, packed_call
from axattn.backends.varlen_engine.per_document import documents_of, mean_of_keys, smoothed_keys
from axattn.backends.varlen_engine.sinks import with_sinks
from axattn.errors import Reason
from axattn.hf import hub_kernels
from axattn.kernels.document_statistics import Documents, smoothed
from axattn.machine.environment import Environment
from axattn.masks.varlen_layout import Layout
from axattn.spec.capability import Capability
from axattn.spec.names import HubPath
from axattn.spec.options import Option, one_of

CAPABILITY = dataclasses.replace(
    QUANTISED,
    head_dim_multiple=8,
    window=True,
    notes={
        "": "a single query (decoding) runs on varlen, which is exact",
        "softcap": "in inference only; decoding runs on eager",
    },
)
LIBRARY = Capability(
    exactness="lossy",
    devices=frozenset({"cuda"}),
    dtypes=HALVES,
    head_dims=frozenset({64, 128}),
    grouped_heads=True,
    causal=True,
    chunk=True,
    padding=True,
    segments=True,
    cross_lengths=True,  # for decoding, which runs on varlen; `_library_call` passes longer queries on too
    gradient=True,
    deterministic=True,
    traced=True,
    notes={"": "causal self-attention; backward recomputes the exact output; decoding runs on varlen, which is exact"},
)
"""sageattention 1.0.6: it leaves padded keys unmasked when not causal, and aligns fewer queries than keys top-left."""

PROVIDER = Option(
    "provider",
    "auto",
    'who runs it: "triton" (axattn\'s kernel), "library" (sageattention), or "auto", the first that can',
    one_of("auto", "triton", "library"),
    {"triton": "sage", "library": "sage:library"},
)


# ---- axattn's kernel -------------------------------------------------------------------------------------------------


def sage(call: AttentionCall) -> torch.Tensor:
    """INT8 attention by axattn's Triton kernel; returns ``[B, S, H, Dv]``."""
    if call.query.shape[2] == 1:
        return exact_attention(call)
    layout = layout_of(call)
    if call.sinks is not None:
        return with_sinks(call, layout, _pair(call))
    exact = BACKEND.option(call, "backward") == "exact"

    def kernel(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
        packed = Packed(cu_q, cu_k, max_q, max_k, layout.causal, layout.window, call.scale)
        return _quantised(q, k, v, packed, layout, softcap=call.softcap or 0.0, exact_backward=exact)[0]

    query, key, value = one_head_dim(call.query, call.key, call.value)
    return packed_call(query, key, value, layout, kernel)[..., : call.value.shape[-1]]


def _quantised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed,
    layout: Layout,
    *,
    softcap: float = 0.0,
    exact_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[tokens, H, D]`` and logsumexp ``[H, tokens]``."""
    from axattn.backends import int8_operator

    queries, keys = documents_of(layout, q.device)
    blocks = _blocks(layout, queries, int8_operator.block_of(q))
    return int8_operator.attention(q, k, v, packed, blocks, None if softcap else keys, softcap, exact_backward)


def forward_backward(call: AttentionCall) -> ForwardBackward | None:
    """Its forward and backward as separate functions; None without a gradient, and for a single query."""
    if call.softcap is not None or call.query.shape[2] == 1:
        return None
    return _pair(call)


def _pair(call: AttentionCall) -> ForwardBackward:
    return over_packed(_FORWARD_BACKWARD_EXACT if BACKEND.option(call, "backward") == "exact" else _FORWARD_BACKWARD)


_FORWARD_BACKWARD = PackedForwardBackward(_quantised, smoothed_keys, key_mean=mean_of_keys)
_FORWARD_BACKWARD_EXACT = _FORWARD_BACKWARD._replace(recompute=exact_forward)


def _blocks(layout: Layout, queries: Documents, block: int) -> torch.Tensor:
    """The query blocks of a layout, made once for all layers that share it."""
    from axattn.kernels.int8_attention import query_blocks

    return layout.kept(f"blocks-{block}", lambda: query_blocks(queries.lengths, block, queries.device))


def probe(environment: Environment) -> list[Reason]:
    """Every reason why a machine can't run axattn's kernel."""
    reasons: list[Reason] = []
    if not environment.triton_interpret:
        check_gpu(reasons, "sage", environment, minimum_sm=80)
    check_library(reasons, "triton", "triton", environment, "pip install triton", "3.3")
    reasons += unusable(environment)  # backward and decoding run on them
    return reasons


def _capability(environment: Environment) -> Capability:
    if not environment.triton_interpret:
        return CAPABILITY
    # triton 3.7's interpreter keeps bfloat16 as integers, and multiplies those
    return dataclasses.replace(CAPABILITY, devices=frozenset({"cpu", "cuda"}), dtypes=frozenset({"float16", "float32"}))


def _notice(environment: Environment) -> str:
    if not environment.triton_interpret:
        return ""
    return "sage runs in Triton's interpreter (TRITON_INTERPRET=1): for tests, not for speed"


# ---- the library and the hub kernel ----------------------------------------------------------------------------------


def library(call: AttentionCall) -> torch.Tensor:
    """INT8 attention by the ``sageattention`` library; returns ``[B, S, H, Dv]``."""
    return _library_call(call, "sageattention")


def _library_call(call: AttentionCall, source: str) -> torch.Tensor:
    if call.query.shape[2] == 1:
        return exact_attention(call)
    layout = layout_of(call)
    if any(s.q1 - s.q0 != s.k1 - s.k0 for s in layout.spans):  # several tokens over a cache: aligned top-left
        return exact_attention(call)

    def kernel(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
        packed = Packed(cu_q, cu_k, max_q, max_k, layout.causal, layout.window, call.scale)
        _, keys = documents_of(layout, q.device)
        rows = layout.rows if layout.whole_rows else 0
        out: torch.Tensor = _Library.apply(q, k, v, packed, keys, rows, source)  # type: ignore[no-untyped-call]  # torch's apply has no annotations
        return out

    return packed_call(call.query, call.key, call.value, layout, kernel)


class _Library(torch.autograd.Function):
    """The library's forward over ``[tokens, H, D]``, with the exact kernel's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: Packed,
        keys: Documents,
        rows: int,
        source: str,
    ) -> torch.Tensor:
        module = sage_module(source)
        smooth = smoothed(k, keys)  # a copy: the library writes into its keys
        ctx.save_for_backward(q, k, v)
        ctx.packed = packed
        out: torch.Tensor
        if rows:
            parts = [x.reshape(rows, -1, *x.shape[1:]) for x in (q, smooth, v)]
            out = module.sageattn(*parts, tensor_layout="NHD", is_causal=True, sm_scale=packed.scale, smooth_k=False)
            return out.reshape(q.shape)
        if not hasattr(module, "sageattn_varlen"):  # the hub kernel: one call per document
            options = {"tensor_layout": "NHD", "is_causal": True, "sm_scale": packed.scale}
            pieces = zip(*(torch.split(x, list(keys.lengths)) for x in (q, smooth, v)), strict=True)
            return torch.cat([module.sageattn(*(x[None] for x in piece), **options)[0] for piece in pieces])
        lengths = (packed.cu_q, packed.cu_k, packed.max_q, packed.max_k)
        out = module.sageattn_varlen(q, smooth, v, *lengths, is_causal=True, sm_scale=packed.scale, smooth_k=False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        out, lse = exact_forward(q, k, v, ctx.packed)
        return (*flash_backward(grad, q, k, v, out, lse, ctx.packed), None, None, None, None)


_trusted: set[str] = set()
"""Hub paths that the user trusts (``allow_all_kernels=True``)."""


def load_hub(source: str, *, trust: bool) -> None:
    """Load a hub kernel before its first call.

    Args:
        source: ``org/name@revision``.
        trust: run its code, whoever publishes it.

    Raises:
        ImportError: it has no ``sageattn``.
    """
    if trust:
        _trusted.add(source)
    if not hasattr(sage_module(source), "sageattn"):
        raise ImportError(f"{source} has no sageattn")


@functools.cache
def sage_module(source: str) -> Any:
    """The module with ``sageattn`` (and ``sageattn_varlen``): the library, or a hub kernel ``org/name@revision``."""
    if "/" not in source:
        return importlib.import_module(source)
    repository, _, revision = source.partition("@")
    return hub_kernels.get(repository, revision or "main", trust=source in _trusted)


def probe_library(environment: Environment) -> list[Reason]:
    """Every reason why a machine can't run the library."""
    reasons: list[Reason] = []
    check_gpu(reasons, "sageattention", environment, minimum_sm=80)
    check_library(reasons, "sageattention", "sageattention", environment, "pip install sageattention", "1.0.6")
    reasons += unusable(environment)  # backward and decoding run on them
    return reasons


HUB_ARCHITECTURES = (80, 89, 90, 120)
"""The architectures that the hub's ``sageattn`` serves (kernels-community, sage-attention/: core.py); others raise."""
HUB = dataclasses.replace(
    LIBRARY,
    notes={"": "causal self-attention, one launch per document; backward recomputes the exact output"},
)


def hub_sage(path: HubPath) -> Backend:
    """A backend record for a sage kernel on the hub, run like the library."""

    def probe_hub(environment: Environment) -> list[Reason]:
        reasons: list[Reason] = []
        check_gpu(reasons, str(path), environment, minimum_sm=80)
        if not reasons and environment.sm not in (None, *HUB_ARCHITECTURES):
            served = ", ".join(f"sm{sm}" for sm in HUB_ARCHITECTURES)
            text = f"{environment.gpu or 'the GPU'} is sm{environment.sm}, {path.repository} runs on {served}"
            reasons.append(Reason("gpu", text, "sage"))
        check_library(reasons, "kernels", "kernels", environment, "pip install kernels", "0.16")
        if path.function not in (None, "sageattn"):
            reasons.append(Reason("name", f"sage kernels are called by axattn, not as {path.function!r}"))
        if path.repository.endswith("/sage-blackwell"):
            text = f"{path.repository} has only sageattn3_blackwell (FP4, whole rows of one length, no scale)"
            reasons.append(Reason("name", text, "sage, which runs on Blackwell"))
        return reasons

    source = str(HubPath(path.repository, path.revision))
    return Backend(
        str(path),
        "hub kernel: SageAttention, run by axattn",
        HUB,
        probe_hub,
        functools.partial(_library_call, source=source),
        install="pip install kernels",
        spans=True,
    )


BACKEND = Backend(
    "sage",
    "SageAttention, INT8: axattn's Triton kernel",
    CAPABILITY,
    probe,
    sage,
    install="pip install triton",
    on=_capability,
    options=(PROVIDER, BACKWARD),
    notice=_notice,
    spans=True,
    forward_backward=forward_backward,
)
BACKENDS = (
    BACKEND,
    Backend(
        "sage:library",
        "SageAttention, INT8: the sageattention library (kernel_options={'provider': 'library'})",
        LIBRARY,
        probe_library,
        library,
        install="pip install sageattention",
        spans=True,
    ),
)
