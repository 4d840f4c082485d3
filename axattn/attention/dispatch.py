"""Dispatch of a call: what it needs, and the route's first kernel that serves it, cached."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from axattn.backends.base import Backend
from axattn.backends.call import AttentionCall
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf import determinism
from axattn.hf.torch_internals import is_tracing
from axattn.masks.lazy_mask import LazyMask
from axattn.planning.routes import Route
from axattn.spec.capability import Capability, Need, missing


def decide(route: Route, call: AttentionCall, sparse: bool) -> Backend:
    """The backend of a call.

    Args:
        route: route of the attention module; it caches decisions by kind of call.
        call: the call.
        sparse: whether it has sparse indices.

    Raises:
        UnsupportedAttentionError: no kernel of the route serves it, or its meaning is ambiguous.
    """
    query, key, value, mask = call.query, call.key, call.value, call.mask
    window = call.window
    if isinstance(mask, LazyMask):
        kind: Any = mask.signature()
        window = kind[1]
    else:
        kind = "no mask" if mask is None else "dense"
        if mask is None and call.causal and 1 < query.shape[2] != key.shape[2]:
            raise UnsupportedAttentionError(
                f"{route.asked} can't serve {route.layer}",
                [Reason("causal", f"causal attention of {query.shape[2]} queries over {key.shape[2]} keys, no mask")],
                "Transformers' own kernels align it differently; pass an attention mask.",
            )
    if is_tracing():  # a cache read while tracing would become a guard, and each call a new graph
        return route.choose(need_of(call, sparse, kind))
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    fingerprint = (
        kind,
        query.shape[1],
        query.shape[-1],
        key.shape[1],
        value.shape[-1],
        query.shape[2] == key.shape[2],
        query.shape[2] == 1,
        window is not None and window < key.shape[2],  # a longer window has no effect: `need_of`
        query.dtype,
        query.device.type,
        call.causal,
        call.window,
        call.dropout,
        call.softcap,
        call.sinks is None,
        call.bias is None,
        sparse,
        call.want_weights,
        gradient,
        gradient and torch.are_deterministic_algorithms_enabled(),
        gradient and determinism.required(call.extras.get("deterministic")),
    )
    backend = route.decisions.get(fingerprint)
    if backend is None:
        need = need_of(call, sparse, kind)
        backend = route.choose(need)
        _warn_if_lacking(backend, route.kernels[backend.name][1], need)
        route.decisions[fingerprint] = backend
    return backend


def need_of(call: AttentionCall, sparse: bool, signature: Any) -> Need:
    """What a call needs from a kernel.

    Args:
        call: the call.
        sparse: whether it has sparse indices.
        signature: signature of its `LazyMask`, if it has one.
    """
    query, key, value, mask = call.query, call.key, call.value, call.mask
    causal, window, chunk, dense = call.causal and query.shape[2] > 1, call.window, None, False
    padding = non_contiguous_padding = segments = stems = False
    if isinstance(mask, LazyMask):
        causal, window, chunk, dense, padding, segments, stems, unknown = signature
        if dense and not unknown:
            dense, non_contiguous_padding = False, True
    elif mask is not None:
        window, dense = None, True
    if window is not None and window >= key.shape[2]:
        window = None
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return Need(
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        causal=causal,
        window=window,
        chunk=chunk,
        softcap=call.softcap,
        sinks=call.sinks is not None,
        bias=call.bias is not None,
        sparse=sparse,
        dropout=call.dropout,
        dense_mask=dense,
        weights=call.want_weights,
        padding=padding,
        non_contiguous_padding=non_contiguous_padding,
        segments=segments,
        stems=stems,
        traced=isinstance(mask, LazyMask) and is_tracing() and mask.as_flag is None,
        cross_lengths=True if query.shape[2] != key.shape[2] else False,  # noqa: SIM210  # symbolic while tracing
        gradient=gradient,
        deterministic=gradient and determinism.required(call.extras.get("deterministic")),
        dtype=str(query.dtype).removeprefix("torch."),
        device=query.device.type,
    )


def _warn_if_lacking(backend: Backend, capability: Capability, need: Need) -> None:
    """Warn about a kernel without a deterministic gradient, as torch does with ``warn_only=True``."""
    if need.gradient and not need.deterministic and torch.are_deterministic_algorithms_enabled():
        for reason in missing(replace(need, deterministic=True), capability, backend.name):
            if reason.feature == "deterministic":  # Python's filter shows each text once
                warnings.warn(f"axattn: {reason.text}", UserWarning, stacklevel=2)
