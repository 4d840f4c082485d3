"""The attention function of every axattn backend: normalises a call, dispatches and runs it.

It drops no keyword: one with a value is used by the kernel, known to be harmless, or refused.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.attention.dispatch import decide
from axattn.attention.short_path import key_of, note_of
from axattn.backends.base import Backend, nan_where_not_finite
from axattn.backends.call import AttentionCall
from axattn.backends.compiled_ops.portable import portable
from axattn.backends.compiled_ops.varlen_op import over_documents
from axattn.documents.forward_context import current
from axattn.documents.traced import TracedSegments
from axattn.errors import AxattnError, BackendUnavailableError, Reason, UnsupportedAttentionError
from axattn.hf.caches import is_unpaged_cache
from axattn.hf.forward_inputs import AT_ATTENTION, CACHES, PAGED
from axattn.hf.registries import require_mask
from axattn.hf.torch_internals import is_tracing, needs_torch_operators
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.shard_mask import PlacedMask, ShardMask
from axattn.masks.user_masks import read_mask, with_keyword_segments
from axattn.patches.double_backward import refuse_second_gradient
from axattn.planning.routes import ATTRIBUTE, Route, route_of

SERVED: frozenset[str] = frozenset(
    {"dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux", "sinks", "position_bias"}
    | {"output_attentions"}
)
NO_EXTRAS = AT_ATTENTION - set(CACHES) | {"dropout", "scaling", "is_causal", "sliding_window"}
"""Under a `LazyMask.as_flag` mask these change only the scale: the mask defines causality and window."""
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
        attention_mask: a `LazyMask`, a 4-D tensor (bool: True attends; float: additive), a 2-D ``[B, T]`` mask (real
            keys), a ``BlockMask`` of flex attention, or None.
        kwargs: Transformers' keywords.

    Returns:
        Output ``[B, S, H, Dv]``, and the attention weights ``[B, H, S, T]`` if requested, else None.

    Raises:
        UnsupportedAttentionError: an unsupported keyword, or no kernel that serves the call.
        InvalidInputError: a mask of the wrong shape or dtype.
    """
    route: Route | None = module.__dict__.get(ATTRIBUTE)
    if route is None or route.asked != name:
        route = route_of(module, name)
    short_key = None
    if (
        type(attention_mask) is LazyMask
        and attention_mask.segments is None
        and kwargs.keys() <= NO_EXTRAS
        and not kwargs.get("dropout")
        and not is_tracing()
    ):
        seen = (route.candidates, query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype)
        note = attention_mask.notes.get(seen)
        if note is None:
            short_key = key_of(attention_mask, query, key, value)
            note = note_of(route, short_key, attention_mask, query, key, value)
        if note is not None:
            route.served[note.served] = route.served.get(note.served, 0) + 1
            out = note.kernel(query, key, value, scale=kwargs.get("scaling")).transpose(1, 2).contiguous()
            check_nan = torch.is_grad_enabled() and query.device.type == "cpu"
            return (nan_where_not_finite(out, query) if check_nan else out), None
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
    if not query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled(query.device.type):
        query, key, value = _one_dtype(query, key, value)
    if type(attention_mask) is ShardMask:
        from axattn.parallel.ulysses import over_ranks

        shared: tuple[torch.Tensor, None] = over_ranks(attend, name, module, query, key, value, attention_mask, kwargs)
        return shared
    if type(attention_mask) is PlacedMask:
        from axattn.parallel.fetch import over_placed

        placed: tuple[torch.Tensor, None] = over_placed(attend, name, module, query, key, value, attention_mask, kwargs)
        return placed
    if attention_mask is None or isinstance(attention_mask, torch.Tensor):
        _require_document_mask(route, query, key, attention_mask)
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
        want_weights=bool(kwargs.get("output_attentions"))
        or (mask.weights if isinstance(mask, LazyMask) else _hook_wants_weights()),
    )
    if needs_torch_operators():
        out = portable(call, route.kernels[route.planned][0], route.layer)
        route.count(call.ran)
        return out.contiguous(), call.weights
    backend = decide(route, call, sparse)
    out = run_library(backend, call, route) if backend.install else run(backend, call, route)
    route.count(call.ran or backend.name)
    if short_key is not None and backend.is_sdpa:
        route.short[short_key] = backend.name
    elif not backend.capability.second_gradient:
        refuse_second_gradient(out, backend.name)
    return out.contiguous(), call.weights


def run(backend: Backend, call: AttentionCall, route: Route) -> torch.Tensor:
    """Run the kernel; returns ``[B, S, H, Dv]``."""
    if backend.spans and is_tracing():
        variant = None if call.module.training else backend.variant
        call.ran = backend.name if variant is None else variant.evaluates
        deterministic = bool(call.extras.get("deterministic"))
        return over_documents(call, call.ran, route.options_json_deterministic if deterministic else route.options_json)
    return backend.called(call)


def run_library(backend: Backend, call: AttentionCall, route: Route) -> torch.Tensor:
    """Run another library's kernel. If its first call on a layer fails, the error names the kernel and an alternative.

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


def _hook_wants_weights() -> bool:
    context = current()
    return context is not None and context.weights


def _require_document_mask(route: Route, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise if an input hook found documents, and the mask with them did not reach the layer.

    Another library has removed it (accelerate's context parallel does), or the model makes its own (LayoutLM). The
    documents can't be added here: if a checkpoint runs the layer again, no input hook has run.
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
        text, advice = "it makes its mask itself, without the documents", "Give it one document per row, padded."
    raise UnsupportedAttentionError(f"{route.asked} can't serve {route.layer}", [Reason("segments", text)], advice)


def _refuse_lengths(route: Route, query: torch.Tensor, key: torch.Tensor, mask: LazyMask) -> None:
    """Raise for a layer with more keys (DeepSeek-V4's compressed ones) or fewer than its mask has.

    Raises:
        UnsupportedAttentionError: always.
    """
    layer, made = (query.shape[2], key.shape[2]), tuple(mask.shape[2:])
    text = f"the layer has {layer[0]} queries and {layer[1]} keys, its mask is made for {made[0]} and {made[1]}"
    raise UnsupportedAttentionError(
        f"{route.asked} can't serve {route.layer}",
        [Reason("attention_mask", text)],
        'Use attn_implementation="eager".',
    )


def _one_dtype(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three in one dtype: under autocast that of autocast (RoPE casts q and k back to fp32 there; float64 is not
    cast), else the widest of the three."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (query.dtype, key.dtype, value.dtype):
        dtype = torch.get_autocast_dtype(kind)
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
