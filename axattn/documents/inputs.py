"""Checks and conversions of the inputs of a model's forward. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch

from axattn.documents import native_guard
from axattn.documents.boundaries import Segments, from_cu_seqlens
from axattn.documents.peft_row_effects import reasons_by_document
from axattn.errors import AxattnError, InvalidInputError, Reason, UnsupportedAttentionError
from axattn.hf.caches import cache_length, held_tokens
from axattn.hf.forward_inputs import caches_of, may_describe_documents
from axattn.hf.torch_internals import is_tracing, require_when_run
from axattn.spec import names
from axattn.traits.model_traits import ModelTraits

_ONE_DOCUMENT_A_ROW = "Give it one document a row, padded."


def documents_of_lengths(cu_q: Any, cu_k: Any, rows: int, length: int) -> Segments:
    """The documents that ``cu_seq_lens_q`` and ``cu_seq_lens_k`` describe; one of them may be None.

    Raises:
        InvalidInputError: they are invalid (see `from_cu_seqlens`), or differ.
    """
    found = [
        from_cu_seqlens(value, rows, length, name)
        for name, value in (("cu_seq_lens_q", cu_q), ("cu_seq_lens_k", cu_k))
        if value is not None and not (name == "cu_seq_lens_k" and value is cu_q)
    ]
    if len(found) == 2 and found[0].boundaries != found[1].boundaries:
        raise InvalidInputError(
            "cu_seq_lens_q and cu_seq_lens_k describe different documents",
            advice="In self-attention over packed rows they are the same tensor.",
        )
    return found[0]


def mask_of_tokens(mask: torch.Tensor | None, length: int, caches: list[Any]) -> torch.Tensor | None:
    """The columns ``[B, S]`` of a 2-D mask ``[B, T]`` for this forward's own tokens, which follow those of a cache.

    None for a single token (nothing to separate), and for a cache whose length is unknown while tracing.
    """
    if mask is None or mask.shape[-1] == length:
        return mask
    if length < 2:
        return None
    cache = next((cache for cache in caches if hasattr(cache, "get_seq_length")), None)
    held = 0 if cache is None else cache.get_seq_length()
    if isinstance(held, torch.Tensor):
        if is_tracing():
            return None
        held = int(held)
    own = mask[:, held : held + length]
    return own if own.shape[-1] == length else None


def require_mask_fits(mask: Any, length: int, caches: list[Any]) -> None:
    """Raise if a 2-D mask ``[B, T]`` covers more tokens than a forward and its cache have: read at the wrong offset, it
    would describe wrong documents.

    PEFT 0.21 passes its prefix as ``past_key_values``, which Transformers 5.24 drops in favour of ``cache``; the mask
    still covers the prefix.

    Raises:
        InvalidInputError: the mask is too wide.
    """
    held = max(map(cache_length, caches), default=0)
    if isinstance(mask, torch.Tensor) and mask.shape[-1] > held + length:
        raise InvalidInputError(
            f"attention_mask has {mask.shape[-1]} columns, for {length} tokens over a cache of {held}",
            [Reason("attention_mask", "it covers tokens that are not there (a dropped prefix or cache)")],
            f"Pass a mask of [{mask.shape[0]}, {held + length}].",
        )


def document_ids_of(index: Any, mask: torch.Tensor | None, rows: int, length: int) -> torch.Tensor:
    """int64 ``[B, S]``: document ids from 1 on, 0 for padding, from ``seq_idx`` and a 2-D mask.

    Args:
        index: the document of each token, ``[B or 1, S]`` (``DataCollatorWithFlattening(return_seq_idx=True)``).
        mask: ``[B, S]``, 0 for padding; it may hold document ids too. None if no token is padding.
        rows: B.
        length: S.

    Raises:
        InvalidInputError: `index` has another shape or dtype.
    """
    fits = isinstance(index, torch.Tensor) and index.ndim == 2 and index.shape[0] in (1, rows)
    if not fits or index.shape[1] != length or index.is_floating_point():
        shown = f"shape {list(index.shape)}, {index.dtype}" if isinstance(index, torch.Tensor) else repr(index)
        raise InvalidInputError(
            f"seq_idx is {shown}, but the batch has {rows} rows of {length} tokens",
            advice=f"Pass the index of each token's document, int32 [{rows}, {length}], or leave it out.",
        )
    document_ids: torch.Tensor = (index.long() - index.min() + 1).expand(rows, length)
    if mask is None:
        return document_ids
    real = (mask != 0).to(document_ids.device)
    document_ids = document_ids * (mask.max().long() + 1).to(document_ids.device) + mask.to(
        document_ids.device, torch.long
    )
    return document_ids * real


def text_positions(positions: Any, rows: int, length: int, planes: tuple[int, ...]) -> torch.Tensor | None:
    """The text positions ``[B or 1, S]`` in ``position_ids``, None if it has none to read documents from.

    Raises:
        InvalidInputError: another shape, or a dtype that is not an integer type.
    """
    if not isinstance(positions, torch.Tensor):
        return None
    shape = positions.shape
    if positions.is_floating_point() or positions.dtype == torch.bool:
        dtype = str(positions.dtype).removeprefix("torch.")
        raise InvalidInputError(f"position_ids have dtype {dtype}", advice="Positions are integers (torch.long).")
    if positions.ndim == 3 and planes:
        if shape[0] in planes and shape[1] in (1, rows) and shape[2] == length:
            return None if shape[0] == 3 else positions[0]
    elif positions.ndim == 2 and shape[0] in (1, rows) and shape[1] == length:
        return positions
    elif positions.ndim == 1 and shape[0] == length:
        return positions[None]
    legal = f"[{rows}, {length}] or [1, {length}]"  # built late: it would recompile for each length
    if positions.ndim == 3 and planes:
        legal = f"[{'|'.join(map(str, planes))}, {rows}, {length}]"
    raise InvalidInputError(
        f"position_ids have shape {list(shape)}, but the batch has {rows} rows of {length} tokens",
        advice=f"This model takes {legal}.",
    )


def require_counted_from(first: int, module: torch.nn.Module, positions: torch.Tensor, mask: Any) -> None:
    """Models of the RoBERTa family count from ``padding_idx + 1``; lower positions are padding's or unused.

    Raises:
        InvalidInputError: a real token has a lower position.
    """
    if is_tracing():
        real = positions if mask is None else positions.masked_fill(mask == 0, first)
        require_when_run((real >= first).all(), "position_ids start at padding_idx + 1 in this model")
        return
    real = positions if mask is None else positions.expand(mask.shape)[mask != 0]
    low = int(real.min()) if real.numel() else first
    if low < first:
        raise InvalidInputError(
            f"position_ids start at {low}, but {type(module).__name__} counts from {first}",
            [Reason("position_ids", f"position {first - 1} is that of padding")],
            f"Give position_ids + {first - low} (PackingCollator takes first_position).",
        )


def require_first_is_real(text: str, mask: torch.Tensor) -> None:
    """Kernels compute other outputs for padding than eager attention does, so no output may be read from it.

    Raises:
        InvalidInputError: a row starts with padding.
    """
    if is_tracing():
        require_when_run((mask[:, 0] != 0).all(), f"{text}, and rows are padded on the left")
    elif not bool((mask[:, 0] != 0).all()):
        advice = 'Set tokenizer.padding_side = "right", or use attn_implementation="eager".'
        raise InvalidInputError("rows are padded on the left", [Reason("padding", text)], advice)


def switched_to_native(traits: ModelTraits, module: torch.nn.Module) -> str:
    """The native name that ``model.set_attn_implementation`` set on a model after axattn, ``""`` for none."""
    config: Any = module.config
    running = config._attn_implementation
    return running if traits.native is None and isinstance(running, str) and names.is_native(running) else ""


def require_axattn_backend(traits: ModelTraits, module: torch.nn.Module) -> None:
    """Raise if a model was `switched_to_native`: its input hook assumes an axattn backend, which separates documents
    and shards, and does not guard the native name.

    Raises:
        UnsupportedAttentionError: the model was switched.
    """
    refusal = _switched_error(traits, module)
    if refusal is not None:
        raise refusal


def _switched_error(traits: ModelTraits, module: torch.nn.Module) -> AxattnError | None:
    running = switched_to_native(traits, module)
    if not running:
        return None
    text = f"it was switched to {running} after axattn had set another kernel"
    advice = f'Use axattn.apply(model, "{running}"), or axattn.restore(model) first.'
    title = f"{type(module).__name__} can't run rows that are packed or split"
    return UnsupportedAttentionError(title, [Reason("model", text)], advice)


def require_no_hidden_documents(
    module: torch.nn.Module,
    unknown: Mapping[str, list[torch.Tensor]],
    mask: torch.Tensor | None,
    rows: int,
    length: int,
) -> None:
    """Raise for a keyword that axattn does not know and that may describe documents: they would leak.

    Args:
        module: the model.
        unknown: the tensors per token in such keywords (`axattn.hf.forward_inputs.unknown_tensors`).
        mask: the 2-D mask ``[B, S]``, or None.
        rows: B.
        length: S.

    Raises:
        UnsupportedAttentionError: one of them may describe several documents. A compiled graph asserts this when it
            runs.
    """
    for name, tensors in unknown.items():
        for x in tensors:
            may_describe = may_describe_documents(x, mask, rows, length)
            if may_describe is None:
                continue
            if is_tracing():
                require_when_run(~may_describe, f"{name} is unknown, and may describe packed documents")
            elif bool(may_describe):
                raise UnsupportedAttentionError(
                    f"{type(module).__name__} can't run this batch",
                    [Reason(name, f"{name}: an unknown keyword whose values may describe packed documents")],
                    "Describe documents by position_ids, cu_seq_lens_q or seq_idx.",
                )


def refusals(
    traits: ModelTraits, module: torch.nn.Module, inputs: dict[str, Any], length: int, unknown: Iterable[str]
) -> Iterator[AxattnError]:
    """The errors for a model, or inputs, that can't run packed rows whatever their documents are. Reads no tensor
    values while a graph is traced.

    Args:
        traits: the traits of the model.
        module: the model.
        inputs: of its forward, by name.
        length: S.
        unknown: unknown keywords that hold a value per token.
    """
    name = type(module).__name__
    refusal = _switched_error(traits, module)
    if refusal is not None:
        yield refusal
    if traits.encoder_decoder:
        reasons = [Reason("segments", "its cross-attention has no document boundaries")]
        yield InvalidInputError("packed rows were given to an encoder-decoder model", reasons, _ONE_DOCUMENT_A_ROW)
    for cache in caches_of(inputs):
        held = held_tokens(cache)
        held = held if is_tracing() else int(held)
        if isinstance(held, torch.Tensor) or held > 0:  # a graph can't know whether a static cache is empty
            yield InvalidInputError(
                "packed rows can't continue from a cache",
                [Reason("segments", f"the cache already holds {held} tokens of unknown documents")],
                "Pass no cache, or one document a row.",
            )
    if unknown:
        reasons = [Reason(keyword, f"{keyword}: what an unknown keyword says of the tokens") for keyword in unknown]
        yield InvalidInputError(f"packed rows can't run in {name} with these inputs", reasons, _ONE_DOCUMENT_A_ROW)
    blockers = [*traits.packing_blockers, *(traits.packing_blockers_in_graph if is_tracing() else ())]
    if blockers:
        yield UnsupportedAttentionError(f"packed rows can't run in {name}", blockers, _ONE_DOCUMENT_A_ROW)
    if traits.max_row_length is not None and length > traits.max_row_length:
        text = f"its layers without RoPE scale queries by their position in the row, from {traits.max_row_length} on"
        yield UnsupportedAttentionError(
            f"{name} can't take packed rows of {length} tokens",
            [Reason("segments", text)],
            f"Pack into rows of at most {traits.max_row_length} tokens.",
        )


def require_packable(
    traits: ModelTraits,
    module: torch.nn.Module,
    inputs: dict[str, Any],
    segments: Segments,
    unknown: Iterable[str],
    mask: Any,
) -> None:
    """Raise for packed rows that this model or these inputs rule out: the first of `refusals`, then checks that depend
    on the documents.

    Args:
        traits: the traits of the model.
        module: the model.
        inputs: of its forward, by name.
        segments: the documents.
        unknown: unknown keywords that hold a value per token.
        mask: the 2-D mask, or None.

    Raises:
        InvalidInputError: an encoder-decoder, rows that continue from a cache, or an unknown keyword with a value per
            token.
        UnsupportedAttentionError: documents would leak, or get wrong positions.
    """
    for refusal in refusals(traits, module, inputs, segments.length, unknown):
        raise refusal
    name = type(module).__name__
    adapted = reasons_by_document(module)
    if adapted:
        raise UnsupportedAttentionError(f"packed rows can't run in {name}", adapted, _ONE_DOCUMENT_A_ROW)
    if traits.rope_scaling_threshold is not None:
        _require_no_rope_scaling(traits.rope_scaling_threshold, name, inputs.get("position_ids"), segments, mask)
    if traits.native is not None:
        follow = traits.on_flash and traits.takes_lengths
        native_guard.require_no_leak(
            traits.native, module, inputs, segments, mask, lengths_follow=follow, image_blocks=traits.image_blocks
        )


def _require_no_rope_scaling(limit: int, name: str, positions: Any, segments: Segments, mask: Any) -> None:
    """Raise if dynamic NTK would scale the frequencies of all documents: by the highest position given, padding
    included; without positions by the longest document (`axattn.documents.input_hook` does not count padding).

    Raises:
        UnsupportedAttentionError: it would.
    """
    longest = max(b - a for row in segments.boundaries for a, b in pairwise(row))
    if isinstance(positions, torch.Tensor):
        reach = int(positions.max()) + 1
    elif isinstance(mask, torch.Tensor) and mask.shape == segments.document_ids.shape:
        reach = int(segments.positions.masked_fill(mask == 0, 0).max()) + 1
    else:
        reach = longest
    if reach > limit:
        by = f"longest document, of {reach} tokens" if reach <= longest else f"highest position, {reach - 1}"
        raise UnsupportedAttentionError(
            f"{name} can't take packed rows with positions above {limit - 1}",
            [Reason("segments", f"its rotary embedding (dynamic) is stretched by the {by}")],
            _ONE_DOCUMENT_A_ROW,
        )
