"""Masks and documents that reach an attention call directly: a user's own mask, or keywords of a model without an input
hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from axattn.documents import traced
from axattn.documents.boundaries import Segments, from_cu_seqlens, from_positions
from axattn.documents.traced import TracedSegments
from axattn.errors import InvalidInputError, Reason
from axattn.hf.mask_functions import Pattern
from axattn.masks.dense_rule import dense_rule
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import lazy_mask


def read_mask(
    mask: Any, query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None
) -> LazyMask | torch.Tensor:
    """Read a mask that reached an attention function without passing `lazy_mask`.

    Args:
        mask: 4-D ``[B|1, H|1, S|1, T]`` (bool: True attends; float: additive), 2-D ``[B, T]`` (nonzero: a real key;
            the queries are the last keys), or a ``BlockMask`` of flex attention.
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        causal: the rule that a 2-D mask is combined with.
        window: the window that a 2-D mask is combined with.

    Returns:
        The 4-D tensor, or a `LazyMask` for a 2-D mask.

    Raises:
        InvalidInputError: any other shape, dtype or type.
    """
    B, H, S, T = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    if not isinstance(mask, torch.Tensor):
        if type(mask).__name__ == "BlockMask":
            from torch.nn.attention.flex_attention import create_mask

            if tuple(mask.seq_lengths) != (S, T):
                reason = Reason("attention_mask", f"it is made for {mask.seq_lengths}, the call has ({S}, {T})")
                raise InvalidInputError("this BlockMask can't be used", [reason], "Build it for these lengths.")
            return create_mask(mask.mask_mod, B, H, S, T, device=query.device)
        raise InvalidInputError(
            f"attention_mask is a {type(mask).__name__}", advice="Give a 2-D mask, or a 4-D bool or float tensor."
        )
    reasons = []
    legal: tuple[tuple[int, ...], ...] = ((1, B), (1, H), (1, S), (T,))
    shown = f"[{B}|1, {H}|1, {S}|1, {T}]"
    if mask.ndim == 2:
        legal, shown = ((B,), (T,)), f"[{B}, {T}]"
    if mask.ndim not in (2, 4) or any(size not in sizes for size, sizes in zip(mask.shape, legal, strict=True)):
        reasons.append(Reason("attention_mask", f"shape {list(mask.shape)} is not {shown}"))
    if mask.ndim != 2 and mask.dtype != torch.bool and not mask.is_floating_point():
        reasons.append(Reason("attention_mask", f"dtype {str(mask.dtype).removeprefix('torch.')} is not bool or float"))
    if reasons:
        raise InvalidInputError("attention_mask can't be used", reasons, "A 2-D [B, T] mask of 0 and 1 is simplest.")
    if mask.ndim == 4:
        return mask
    return lazy_mask(B, S, T, T - S, 0, _rule(causal, window), mask.to(torch.bool), device=query.device)


def _rule(causal: bool, window: int | None) -> Callable[..., Any]:
    from transformers import masking_utils as mu

    rule: Callable[..., Any] = mu.causal_mask_function if causal else mu.bidirectional_mask_function
    if window is not None and causal:
        rule = mu.sliding_window_causal_mask_function(window)
    elif window is not None:
        rule = mu.sliding_window_bidirectional_mask_function(window - 1)
    return rule


def with_keyword_segments(
    mask: LazyMask | None, causal: bool, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]
) -> LazyMask | None:
    """For models without an input hook, and for vision towers: documents from the call's own keywords."""
    rows, length = query.shape[0], query.shape[2]
    lengths, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if length != key.shape[2] or (mask is not None and mask.segments is not None):
        return mask
    in_graph = torch.compiler.is_compiling()  # no value can be read, so any row may be packed
    segments: Segments | TracedSegments | None = None
    if lengths is not None and in_graph:
        segments = traced.from_cu_seqlens(lengths, rows, length, "cu_seq_lens_q")
    elif lengths is not None:
        segments = from_cu_seqlens(lengths, rows, length)
    elif mask is not None and isinstance(positions, torch.Tensor) and positions.shape[-1] == length:
        text = positions[0] if positions.ndim == 3 and positions.shape[0] == 4 else positions
        if text.ndim == 2 and text.shape[0] in (1, rows):
            padding = mask.padding
            real = None if padding is None else padding[:, :length]
            segments = (traced.from_positions if in_graph else from_positions)(text, real, rows, length)
    if segments is None or (isinstance(segments, Segments) and not segments.packed):
        return mask
    if mask is not None:
        return mask.with_segments(segments)
    window = kwargs.get("sliding_window")
    whole_rows = LazyMask(
        shape=(rows, 1, length, length),
        pattern=Pattern(causal=causal, window=window),
        segments=None,
        padding=None,
        materialise=lambda: dense_rule(length, length, causal=causal, window=window, device=query.device).expand(
            rows, 1, length, length
        ),
        device=query.device,
    )
    return whole_rows.with_segments(segments)
