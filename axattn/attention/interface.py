"""The one attention function behind every name of ours: normalise, route, run, ``[B, S, H, Dv]``.

It drops no keyword: one that carries a value is used by the kernel, known to be harmless, or refused.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.attention.dispatch import decide
from axattn.backends.base import Backend, keep_nan
from axattn.backends.call import AttentionCall
from axattn.backends.compiled_ops.portable import portable
from axattn.backends.compiled_ops.varlen_op import over_documents
from axattn.backends.sdpa import attention
from axattn.documents.forward_context import current
from axattn.documents.traced import TracedSegments
from axattn.errors import AxattnError, BackendUnavailableError, Reason, UnsupportedAttentionError
from axattn.hf.caches import is_unpaged_cache
from axattn.hf.forward_inputs import AT_ATTENTION, CACHES, PAGED
from axattn.hf.registries import require_mask
from axattn.hf.torch_internals import is_tracing, needs_torch_operators
from axattn.hf.torch_sdpa import avoids_cudnn, takes_grouped_heads
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.shard_mask import ShardMask
from axattn.masks.user_masks import read_mask, with_keyword_segments
from axattn.patches.double_backward import require_first
from axattn.planning.routes import ATTRIBUTE, Route, route_of

_sdpa = torch.nn.functional.scaled_dot_product_attention

SERVED: frozenset[str] = frozenset(
    {"dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux", "sinks", "position_bias"}
    | {"output_attentions"}
)
PLAIN = AT_ATTENTION - set(CACHES) | {"dropout", "scaling", "is_causal", "sliding_window"}
"""With a `LazyMask.plain` mask these change nothing but the scale: the mask says what is causal and windowed."""
SPARSE: frozenset[str] = frozenset({"indices", "block_indices"})


def attend(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LazyMask | torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Transformers' attention interface.

    Args:
        name: the registered name.
        module: the attention module.
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, Dv]``.
        attention_mask: our `LazyMask`, a 4-D tensor (bool: True attends; float: additive), a 2-D ``[B, T]`` mask (real
            keys), a ``BlockMask`` of flex attention, or None.
        kwargs: Transformers' keywords.

    Returns:
        Output ``[B, S, H, Dv]``, and the attention weights ``[B, H, S, T]`` if they are asked for, else None.

    Raises:
        UnsupportedAttentionError: an unsupported keyword, or no kernel that serves the call.
        InvalidInputError: a mask of the wrong shape or dtype.
    """
    route: Route | None = module.__dict__.get(ATTRIBUTE)
    if route is None or route.asked != name:
        route = route_of(module, name)
    plain_key = None
    if type(attention_mask) is LazyMask and kwargs.keys() <= PLAIN and not kwargs.get("dropout"):
        # the common call: nothing that F.scaled_dot_product_attention would not do by itself, as an earlier layer found
        compiling = is_tracing()
        hit = None if compiling else attention_mask.hit
        if hit is None and not compiling:
            plain_key = _plain_key(attention_mask, query, key, value)
            served = route.plain.get(plain_key)
            if served is not None:
                hit = attention_mask.hit = _hit(route, served, attention_mask, query, key, value)
        if hit is not None:
            shapes, dtype, order, served, causal, grouped = hit
            if (
                shapes == (query.shape, key.shape, value.shape)
                and query.dtype is dtype
                and key.dtype is dtype
                and value.dtype is dtype
                and order is route.candidates
            ):
                route.served[served] = route.served.get(served, 0) + 1
                scale = kwargs.get("scaling")
                if grouped is None:
                    out = attention(query, key, value, None, 0.0, causal, scale)
                elif grouped:
                    out = _sdpa(query, key, value, None, 0.0, causal, scale=scale, enable_gqa=True)
                else:
                    out = _sdpa(query, key, value, None, 0.0, causal, scale=scale)
                out = out.transpose(1, 2).contiguous()
                return (keep_nan(out, query) if torch.is_grad_enabled() else out), None
    sparse = False
    for keyword, given in kwargs.items():
        if given is None or keyword in SERVED:
            continue
        if keyword in AT_ATTENTION and (keyword not in CACHES or is_unpaged_cache(given)):
            continue
        if keyword in SPARSE:
            sparse = True
        elif given is not False:
            _refuse_keyword(route, keyword, given)
    query, key, value = _one_dtype(query, key, value)
    if type(attention_mask) is ShardMask:
        from axattn.parallel.ulysses import over_ranks

        shared: tuple[torch.Tensor, None] = over_ranks(attend, name, module, query, key, value, attention_mask, kwargs)
        return shared
    if attention_mask is None or isinstance(attention_mask, torch.Tensor):
        _require_our_mask(route, query, key, attention_mask)
    elif type(attention_mask) is LazyMask and attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        _refuse_lengths(route, query, key, attention_mask)
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    mask = attention_mask
    if mask is not None and not isinstance(mask, LazyMask):
        mask = read_mask(mask, query, key, causal, kwargs.get("sliding_window"))
    if mask is None or (isinstance(mask, LazyMask) and not mask.guarded):
        mask = with_keyword_segments(mask, causal, query, key, kwargs)
    sinks = kwargs.get("s_aux")
    scaling = kwargs.get("scaling")
    call = AttentionCall(
        module=module,
        query=query,
        key=key,
        value=value,
        mask=mask,
        causal=causal,
        window=kwargs.get("sliding_window"),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=kwargs.get("dropout") or 0.0,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("sinks") if sinks is None else sinks,
        bias=kwargs.get("position_bias"),
        extras=kwargs,
        options=route.options,
        want_weights=bool(kwargs.get("output_attentions")) or _hook_wants_weights(mask),
    )
    if needs_torch_operators():
        out = portable(call, route.kernels[route.planned][0], route.layer)
        route.count(call.ran)
        return out.contiguous(), call.weights
    backend = decide(route, call, sparse)
    out = run_library(backend, call, route) if backend.install else run(backend, call, route)
    route.count(call.ran or backend.name)
    if plain_key is not None and backend.plain:
        route.plain[plain_key] = backend.name
    elif not backend.capability.second_gradient:
        require_first(out, backend.name)
    return out.contiguous(), call.weights


def run(backend: Backend, call: AttentionCall, route: Route) -> torch.Tensor:
    """The kernel itself; returns ``[B, S, H, Dv]``."""
    assert backend.forward is not None
    if backend.spans and is_tracing():
        call.ran = backend.name if call.module.training or not backend.evaluates else backend.evaluates
        repeats = bool(call.extras.get("deterministic"))
        return over_documents(call, call.ran, route.options_json_deterministic if repeats else route.options_json)
    return backend.forward(call)


def run_library(backend: Backend, call: AttentionCall, route: Route) -> torch.Tensor:
    """A kernel of another library. If its first call on a layer fails, the error names the kernel and a way out.

    Raises:
        BackendUnavailableError: with the library's own error as its cause.
    """
    if backend.name in route.served or is_tracing():
        return run(backend, call, route)
    try:
        return run(backend, call, route)
    except (AxattnError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BackendUnavailableError(
            f"{backend.name} failed in its first call on {route.layer}",
            [Reason("library", f"{type(error).__name__}: {error}")],
            'Try axattn.apply(model, "auto"), which needs no other library.',
        ) from error


def _hook_wants_weights(mask: LazyMask | torch.Tensor | None) -> bool:
    if isinstance(mask, LazyMask):
        return mask.weights
    context = current()
    return context is not None and context.weights


def _require_our_mask(route: Route, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise where an input hook found documents and the mask that knows of them is not the one that came.

    Something took it away (accelerate's context parallel does), or the model makes one itself (LayoutLM). Narrowing
    such a mask here would not do: where a checkpoint runs the layer again, no input hook has run.
    """
    context = current()
    if context is None:
        require_mask(route.asked, route.layer)
        return
    if context.segments is None and context.shard is None:
        return
    if (query.shape[0], query.shape[2]) != context.shape or key.shape[2] != query.shape[2]:
        return
    text = "the mask with the documents of its rows did not reach it (context parallelism takes masks away)"
    if isinstance(context.segments, TracedSegments):
        context.segments.require_single(text)
        return
    advice = "Split rows over ranks with axattn.sequence_parallel."
    if mask is not None:
        text, advice = "it makes its mask itself, without the documents", "Give it one document a row, padded."
    raise UnsupportedAttentionError(f"{route.asked} can't serve {route.layer}", [Reason("segments", text)], advice)


def _refuse_lengths(route: Route, query: torch.Tensor, key: torch.Tensor, mask: LazyMask) -> None:
    """Raise for a layer that makes its keys more (DeepSeek-V4's compressed ones) or fewer than its mask knows.

    Raises:
        UnsupportedAttentionError: always.
    """
    asked, made = (query.shape[2], key.shape[2]), tuple(mask.shape[2:])
    text = f"the layer has {asked[0]} queries and {asked[1]} keys, its mask is made for {made[0]} and {made[1]}"
    raise UnsupportedAttentionError(
        f"{route.asked} can't serve {route.layer}",
        [Reason("attention_mask", text)],
        'Use attn_implementation="eager".',
    )


def _plain_key(mask: LazyMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...] | None:
    """What decides the kernel of a plain call, None when the call is not plain (or its dtypes are not settled)."""
    if not mask.guarded or mask.plain is None or not query.dtype == key.dtype == value.dtype:
        return None
    device, q, k = query.device, query.shape, key.shape
    if (q[2], k[2]) != mask.shape[2:]:
        return None
    if torch.is_autocast_enabled(device.type):
        return None
    return (mask.plain, q[1], q[3], k[1], value.shape[3], query.dtype, device, torch.is_grad_enabled())


def _hit(
    route: Route, served: str, mask: LazyMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[Any, ...]:
    """The note that a layer leaves on the mask for the next layers that have the same candidates. Its last part is
    ``enable_gqa``, None where `attention` is to see to heads or to cuDNN."""
    causal, single = mask.plain == "causal", query.shape[2] == 1
    grouped: bool | None = query.shape[1] != key.shape[1]
    # the note outlives this forward, and a checkpoint's that runs without gradients at first
    apart = avoids_cudnn(query.device, key.shape[2], masked=False, single=single, causal=causal, training=True)
    if apart or (grouped and (single or not takes_grouped_heads(query, key, value, None, 0.0, causal))):
        grouped = None
    return (query.shape, key.shape, value.shape), query.dtype, route.candidates, served, causal, grouped


def _one_dtype(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under autocast its dtype (RoPE brings q and k back to fp32 there), else the widest of the three. Autocast leaves
    float64 alone."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (query.dtype, key.dtype, value.dtype):
        dtype = torch.get_autocast_dtype(kind)
    elif query.dtype == key.dtype == value.dtype:
        return query, key, value
    else:
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _refuse_keyword(route: Route, keyword: str, given: Any) -> None:
    shown = repr(given) if isinstance(given, int | float | str) else f"a {type(given).__name__}"
    if keyword in CACHES or keyword in PAGED:
        reason, advice = "axattn has no paged cache", 'Use attn_implementation="sdpa" for continuous batching.'
    else:
        reason, advice = "an unsupported keyword", 'Use attn_implementation="eager".'
    raise UnsupportedAttentionError(
        f"{route.asked} can't serve {route.layer}", [Reason(keyword, f"{keyword}={shown} ({reason})")], advice
    )
