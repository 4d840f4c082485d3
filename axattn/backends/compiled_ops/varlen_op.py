"""Kernels over spans inside a compiled graph: one opaque operator that reads the documents when it runs.

A graph can't depend on document lengths, so the operator takes the tensor of document ids and builds the `Layout`
itself, once for all layers that share a snapshot (`axattn.hf.tensor_snapshots`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.weak import WeakIdRef

from axattn.backends.call import AttentionCall
from axattn.backends.compiled_ops.body import OpBody, fake_gradients, fake_output, gradients, save_for_backward
from axattn.backends.compiled_ops.masked_op import masked_attention_op
from axattn.backends.exact_fallback import exact_attention
from axattn.documents.traced import TracedSegments
from axattn.hf.mask_functions import Pattern
from axattn.hf.tensor_snapshots import READS_ON_HOST, memo_of
from axattn.masks.dense_rule import chunk_positions, dense_rule
from axattn.masks.lazy_mask import LazyMask


def over_documents(call: AttentionCall, kernel: str, options: str = "{}") -> torch.Tensor:
    """A call as one operator of the graph if queries and keys are the same tokens, else `exact_attention`.

    Args:
        call: its mask is a `LazyMask`, or None for whole rows.
        kernel: the backend that runs inside the operator.
        options: the user's ``kernel_options`` as JSON.

    Returns:
        ``[B, S, H, Dv]``.
    """
    mask, S = call.mask, call.query.shape[2]
    if isinstance(mask, LazyMask):
        whole, pattern, padding, segments = mask.whole, mask.pattern, mask.padding, mask.segments
    else:
        whole, padding, segments = mask is None and call.key.shape[2] == S, None, None
        pattern = Pattern(causal=call.causal and S > 1, window=call.window)
    if not whole or pattern is None or call.dropout:  # dropout: the operator's backward would draw a different mask
        return exact_attention(call)
    out: torch.Tensor
    if isinstance(mask, LazyMask) and mask.handle is not None:  # made outside the graph: a layer compiled by itself
        out, _ = masked_attention_op(
            call.query, call.key, call.value, mask.handle, call.scale, call.softcap, kernel, options, call.sinks
        )
        return out
    out, _ = attention_op(
        call.query,
        call.key,
        call.value,
        None if segments is None else segments.document_ids,
        padding,
        pattern.causal,
        pattern.window,
        pattern.chunk,
        call.scale,
        call.softcap,
        kernel,
        options,
        call.sinks,
    )
    return out


def _mask(
    documents: torch.Tensor | None,
    padding: torch.Tensor | None,
    shape: tuple[int, int],
    causal: bool,
    window: int | None,
    chunk: int | None,
    device: torch.device,
) -> LazyMask:
    """The mask, which caches its layout: one transfer to the host for all layers that share snapshots.

    Tensors that are no snapshots are read at every call, because they may have been changed in place.
    """
    anchor = documents if documents is not None else padding
    if anchor is None:
        return _fixed_mask(shape, causal, window, chunk, device)
    pattern = Pattern(causal=causal, window=window, chunk=chunk)
    known = memo_of(anchor)
    if known is None or (padding is not None and memo_of(padding) is None):
        return _build(documents, padding, shape, pattern, device)
    key = (None if padding is None else WeakIdRef(padding), shape, causal, window, chunk)
    if key not in known:
        known[key] = _build(documents, padding, shape, pattern, device)
    mask: LazyMask = known[key]
    return mask


@functools.lru_cache(maxsize=32)
def _fixed_mask(
    shape: tuple[int, int], causal: bool, window: int | None, chunk: int | None, device: torch.device
) -> LazyMask:
    """The mask of rows without padding or documents."""
    return _build(None, None, shape, Pattern(causal=causal, window=window, chunk=chunk), device)


def _build(
    documents: torch.Tensor | None,
    padding: torch.Tensor | None,
    shape: tuple[int, int],
    pattern: Pattern,
    device: torch.device,
) -> LazyMask:
    rows, length = shape
    return LazyMask(
        shape=(rows, 1, length, length),
        pattern=pattern,
        segments=None if documents is None else TracedSegments(documents, rows, length).read(),
        padding=None if padding is None else padding.clone(),  # a copy: the memo's value must not keep its key alive
        materialise=_no_dense_mask,
        device=device,
    )


def _no_dense_mask() -> torch.Tensor:
    raise AssertionError("a layout needs no dense mask")


def _body(
    query: torch.Tensor,
    documents: torch.Tensor | None,
    padding: torch.Tensor | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
    scale: float,
    softcap: float | None,
    kernel: str,
    options: str,
    sinks: torch.Tensor | None,
) -> OpBody:
    B, _, S, _ = query.shape
    mask = _mask(documents, padding, (B, S), causal, window, chunk, query.device)

    def dense_mask() -> torch.Tensor:
        positions = None if chunk is None else chunk_positions(S, documents, padding, query.device)
        return dense_rule(
            S,
            S,
            causal=causal,
            window=window,
            documents=documents,
            chunk=chunk,
            positions=positions,
            padding=padding,
            device=query.device,
        )

    return OpBody(mask, scale, softcap, kernel, options, dense_mask, sinks)


@torch.library.custom_op("axattn::attention", mutates_args=(), tags=READS_ON_HOST)
def attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    padding: torch.Tensor | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
    scale: float,
    softcap: float | None,
    kernel: str,
    options: str,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of whole rows (S == T) over documents.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        documents: int64 ``[B, S]``, or None when every row is one document.
        padding: bool ``[B, S]`` (True: real key), or None.
        causal: a query attends to no later key.
        window: keys attended to on the left, the query's own included.
        chunk: chunk size of chunked attention.
        scale: factor on the logits.
        softcap: see `axattn.spec.capability.Need`.
        kernel: the backend that runs.
        options: the user's ``kernel_options`` as JSON.
        sinks: ``[H]``, or None.

    Returns:
        Output ``[B, S, H, Dv]``, and what its backward needs besides (`axattn.backends.compiled_ops.body`).
    """
    body = _body(query, documents, padding, causal, window, chunk, scale, softcap, kernel, options, sinks)
    return body.forward(query, key, value)


attention_op.register_fake(fake_output)


@torch.library.custom_op("axattn::attention_backward", mutates_args=(), tags=READS_ON_HOST)
def attention_backward_op(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    padding: torch.Tensor | None,
    out: torch.Tensor | None,
    logsumexp: torch.Tensor | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
    scale: float,
    softcap: float | None,
    kernel: str,
    options: str,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_op` to query, key, value and sinks (empty without sinks)."""
    body = _body(query, documents, padding, causal, window, chunk, scale, softcap, kernel, options, sinks)
    saved = None if out is None or logsumexp is None else (out, logsumexp)
    return body.backward(grad, query, key, value, saved)


attention_backward_op.register_fake(fake_gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    save_for_backward(ctx, inputs, output, tensors=5)


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return gradients(ctx, grad, attention_backward_op, arguments=13)


attention_op.register_autograd(_backward, setup_context=_setup)
