"""Recognises Transformers' mask functions by code object and closure, without calling them.

`recognise` returns a `Pattern` or None; None means "compute the dense mask", which is always correct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

MaskFunction = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Pattern:
    """The compact meaning of a mask function.

    Attributes:
        causal: a query attends to no later key.
        window: number of visible keys to the left, the query's own included (causal); the radius + 1 (bidirectional).
        chunk: chunk size of chunked attention.
        left_padding: int ``[B]``: where the chunks of each row start.
        packed: the mask function separates documents that Transformers found in position_ids.
        document_ids: int ``[B, S]``: those documents.
        base: the mask function without the documents.
    """

    causal: bool
    window: int | None = None
    chunk: int | None = None
    left_padding: torch.Tensor | None = None
    packed: bool = False
    document_ids: torch.Tensor | None = None
    base: MaskFunction | None = None


@dataclass(frozen=True)
class _Known:
    """Functions and code objects of the installed ``transformers.masking_utils``."""

    and_mask: CodeType
    or_mask: CodeType
    blocks: CodeType
    window: CodeType
    window_both: CodeType
    chunk: CodeType
    documents: CodeType
    remap: CodeType | None  # transformers 5.18 and newer count positions from each document's start
    causal: MaskFunction
    bidirectional: MaskFunction


def known() -> _Known:
    """The functions and code objects that `recognise` compares with, read once from the installed Transformers."""
    return _found[0] if _found else _read()  # no functools.cache: torch.compile would trace what it wraps


_found: list[_Known] = []


def _read() -> _Known:
    from transformers import masking_utils as mu

    zero = torch.zeros(1, 1, dtype=torch.long)
    found = _Known(
        and_mask=mu.and_masks(mu.causal_mask_function).__code__,
        or_mask=mu.or_masks(mu.causal_mask_function).__code__,
        blocks=mu.blockwise_overlay(zero).__code__,
        window=mu.sliding_window_overlay(1).__code__,
        window_both=mu.sliding_window_bidirectional_overlay(1).__code__,
        chunk=mu.chunked_overlay(1, zero[0]).__code__,
        documents=mu.packed_sequence_mask_function(zero).__code__,
        remap=_remap_code(mu, zero),
        causal=mu.causal_mask_function,
        bidirectional=mu.bidirectional_mask_function,
    )
    _found[:] = [found]
    return found


def _remap_code(masking_utils: Any, positions: torch.Tensor) -> CodeType | None:
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    return None if remap is None else remap(masking_utils.causal_mask_function, positions).__code__


def closure(function: MaskFunction) -> dict[str, Any]:
    """The closure variables of a function, by name."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def recognise(function: MaskFunction) -> Pattern | None:
    """The `Pattern` of a mask function of Transformers, None if any part of it is unknown."""
    k = known()
    if function is k.causal:
        return _CAUSAL
    if function is k.bidirectional:
        return _FULL
    parts = _flatten(function, k)
    codes = [getattr(part, "__code__", None) for part in parts]
    if k.documents in codes:
        return _packed(parts, codes, k)
    if len(parts) != 2:
        return None
    first = closure(parts[0]) if codes[0] in (k.window, k.window_both, k.chunk) else {}
    if parts[1] is k.causal and codes[0] is k.window:
        return Pattern(causal=True, window=int(first["sliding_window"]), base=function)
    if parts[1] is k.causal and codes[0] is k.chunk:
        return Pattern(causal=True, chunk=int(first["chunk_size"]), left_padding=first["left_padding"], base=function)
    if parts[1] is k.bidirectional and codes[0] is k.window_both:
        return Pattern(causal=False, window=int(first["sliding_window"]) + 1, base=function)
    return None


def recognise_traced(
    function: MaskFunction, local_size: int | None, config: Any, bidirectional: bool
) -> Pattern | None:
    """`recognise` while ``torch.compile`` traces, where closures can't be read.

    Transformers marks user overlays with ``use_vmap`` (excluded by the caller) and adds image blocks with an "or". So
    an "and" is Transformers' own rule, with or without documents, and `local_size` is its window or chunk.

    Args:
        function: the mask function.
        local_size: Transformers' keyword of that name: window or chunk size, None on full layers.
        config: the model's config, which shows whether `local_size` is a window or a chunk.
        bidirectional: whether Transformers' bidirectional mask builder calls.
    """
    k = known()
    if function is k.causal or function is k.bidirectional:
        return _CAUSAL if function is k.causal else _FULL
    if function.__code__ is not k.and_mask:
        return None
    if bidirectional:
        return None if local_size is None else Pattern(causal=False, window=local_size + 1, base=function)
    chunked = local_size is not None and getattr(config, "attention_chunk_size", None) == local_size
    windowed = local_size is not None and getattr(config, "sliding_window", None) == local_size
    if local_size is not None and chunked == windowed:
        return None
    return Pattern(True, local_size if windowed else None, local_size if chunked else None, base=function)


def _flatten(function: MaskFunction, k: _Known) -> list[MaskFunction]:
    if getattr(function, "__code__", None) is not k.and_mask:
        return [function]
    return list(closure(function)["mask_functions"])


def _packed(parts: list[MaskFunction], codes: list[CodeType | None], k: _Known) -> Pattern | None:
    """``documents and rule``, where the rule uses positions in the document or (older Transformers) in the row."""
    if len(parts) != 2:
        return None
    at = codes.index(k.documents)
    base = parts[1 - at]
    if k.remap is not None and codes[1 - at] is k.remap:
        base = closure(base)["mask_function"]
    inner = recognise(base)
    if inner is None or inner.packed:
        return None
    return Pattern(
        causal=inner.causal,
        window=inner.window,
        chunk=inner.chunk,
        left_padding=inner.left_padding,
        packed=True,
        document_ids=closure(parts[at])["packed_sequence_mask"],
        base=base,
    )


_CAUSAL = Pattern(causal=True)
_FULL = Pattern(causal=False)
