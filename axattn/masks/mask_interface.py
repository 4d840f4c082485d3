"""The mask function that Transformers calls for every axattn backend: it describes the mask without computing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from axattn.documents.boundaries import Segments, from_positions, jumping_positions
from axattn.documents.forward_context import Context, current
from axattn.documents.late_inputs import recheck_inputs
from axattn.documents.sequence_shard import SequenceShard
from axattn.documents.traced import TracedSegments
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.hf.callers import reads_last_token
from axattn.hf.mask_functions import Pattern, known, recognise, recognise_traced
from axattn.hf.torch_internals import is_tracing
from axattn.masks.dense_rule import chunk_positions, dense_rule
from axattn.masks.image_blocks import blocks_in_place, require_one_document
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.shard_mask import PlacedMask, ShardMask


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | LazyMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    config: Any = None,
    **others: Any,
) -> LazyMask:
    """Describe the mask that Transformers requests (``transformers.masking_utils``, arguments as for ``sdpa_mask``).

    Documents come from the input hook (see `axattn.documents.input_hook`); without one, those that Transformers itself
    found in ``position_ids`` are used. The remaining keywords (``dtype``, ``allow_is_causal_skip``, ...) only control
    shortcuts that a `LazyMask` does not need.

    Args:
        batch_size: B.
        q_length: S.
        kv_length: T.
        q_offset: absolute position of the first query; a tensor with a static cache (read or copied at once, because
            the cache changes it).
        kv_offset: absolute position of the first key.
        mask_function: Transformers' mask function over absolute indices; causal when None.
        attention_mask: bool ``[B, T']``, True for real tokens, or None.
        use_vmap: the mask function is not index based.
        device: where a dense mask is built.
        local_size: window or chunk size on such layers; read only while ``torch.compile`` traces.
        config: the model's config; read only while tracing.
        others: the remaining keywords.

    Returns:
        A `LazyMask` of shape ``[B, 1, S, T]``.
    """
    context = current()
    if context is not None and context.recheck is not None:
        recheck_inputs(context)
    tracing = is_tracing()
    # static caches, on whose length a graph must not depend: `generate` makes their masks outside the forward that it
    # compiles, and in a graph their length is a tensor
    dense = isinstance(q_offset, torch.Tensor) if tracing else context is None and q_length != kv_length
    if context is not None and context.shard is not None:
        return _shard_mask(context.shard, mask_function, q_length, kv_length, q_offset, kv_offset, use_vmap, device)
    on_host = None
    if isinstance(attention_mask, torch.Tensor) and not dense and not tracing:
        on_host = _padding(attention_mask.cpu(), kv_length, kv_offset)  # the one transfer to the host
        if bool(on_host.all()):
            attention_mask = on_host = None  # no padding: the most common mask
    if (
        mask_function is known().causal
        and attention_mask is None
        and q_length == kv_length
        and (context is None or (context.segments is None and not context.weights))
        and type(q_offset) is int
        and not tracing
        and q_offset == kv_offset
        and not use_vmap
    ):
        return _shared_causal(batch_size, q_length, device, context is not None)
    if isinstance(attention_mask, LazyMask):  # `generate` builds the masks of a static cache before the forward
        return attention_mask
    function = known().causal if mask_function is None else mask_function
    device = torch.device(device)
    offset: Any = q_offset.clone() if dense and isinstance(q_offset, torch.Tensor) else int(q_offset)
    if use_vmap:
        pattern = None
    elif tracing:
        pattern = recognise_traced(function, local_size, config, "allow_is_bidirectional_skip" in others)
    else:
        pattern = recognise(function)
    segments = None if dense else _segments(pattern, batch_size, q_length, offset, kv_length, device)
    if isinstance(segments, Segments) and segments.stems is not None:
        _require_stems_served(pattern, attention_mask)
    if pattern is not None and pattern.base is not None:
        function = pattern.base
    elif pattern is None and segments is not None:
        if isinstance(segments, TracedSegments) and use_vmap:
            require_one_document(segments)
        elif not tracing:
            function = blocks_in_place(function)
    padding = None if attention_mask is None else _padding(attention_mask, kv_length, kv_offset)
    last_is_read = padding is not None and _last_is_read(
        padding if on_host is None else on_host, pattern, q_length, offset, kv_offset
    )
    every_query = last_is_read or (padding is not None and context is not None and context.reads_padding)

    def materialise() -> torch.Tensor:
        from transformers.masking_utils import sdpa_mask

        if isinstance(segments, Segments) and segments.stems is not None:
            return _along_stems(segments, pattern)
        if pattern is not None and pattern.chunk is not None and segments is not None:
            allowed = _chunks_in_documents(segments, pattern.chunk, kv_length, padding)
        else:
            allowed = sdpa_mask(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=offset,
                kv_offset=kv_offset,
                mask_function=function,
                attention_mask=None,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
                use_vmap=use_vmap,
                device=device,
            )
        if padding is not None:
            allowed = allowed & padding[:, None, None, :]
        if segments is not None:
            allowed = allowed & _same_document(segments, kv_length)
        return allowed

    if last_is_read and pattern is not None and (pattern.window or pattern.chunk):
        _require_last_sees_keys(materialise())
    # overlays (the user's, image blocks) are dense anyway, and can't be built inside an operator (vmap)
    ready = not tracing and (use_vmap or (dense and q_length == 1))
    return LazyMask(
        shape=(batch_size, 1, q_length, kv_length),
        pattern=None if every_query else pattern,  # spans omit padding
        segments=segments,
        padding=padding,
        materialise=materialise,
        q_offset=offset,
        kv_offset=kv_offset,
        device=device,
        guarded=context is not None,
        weights=context is not None and context.weights,
        crosses=_crosses(pattern, context, (batch_size, q_length)),
        dense_in_graphs=dense,
        ready=materialise().contiguous() if ready else None,
        padding_on_host=on_host,
    )


_causal_masks: dict[tuple[int, int, torch.device | str, bool], LazyMask] = {}
_CAUSAL_MASKS_KEPT = 8


def _shared_causal(rows: int, length: int, device: torch.device | str, guarded: bool) -> LazyMask:
    """The causal mask of rows with one document and no padding, the most common mask: one object for many forwards.

    Its notes (`LazyMask.notes`) are reused in the next forward. A mask that was made dense is not kept: it would hold
    S x S bytes.
    """
    key = (rows, length, device, guarded)
    mask = _causal_masks.get(key)
    if mask is None or mask.materialised:

        def materialise() -> torch.Tensor:
            return dense_rule(length, length, causal=True, device=device).expand(rows, 1, length, length)

        with torch.inference_mode(False):  # a later training step may save its handle for backward
            mask = LazyMask(
                shape=(rows, 1, length, length),
                pattern=recognise(known().causal),
                segments=None,
                padding=None,
                materialise=materialise,
                device=torch.device(device),
                guarded=guarded,
            )
        if len(_causal_masks) >= _CAUSAL_MASKS_KEPT:
            _causal_masks.clear()
        _causal_masks[key] = mask
    return mask


def _shard_mask(
    shard: SequenceShard,
    mask_function: Callable[..., Any] | None,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    use_vmap: bool,
    device: torch.device | str,
) -> ShardMask | PlacedMask:
    """The mask of the whole rows for a model that runs one shard of them; documents are those of the shard."""
    function = known().causal if mask_function is None else mask_function
    pattern = None if use_vmap else recognise(function)
    reasons = []
    if pattern is None:
        reasons.append(Reason("dense_mask", "its mask is more than causal, windowed or in chunks"))
    if (q_length, kv_length) != (shard.part, shard.part) or int(q_offset) != kv_offset:
        reasons.append(Reason("cross_lengths", f"{q_length} queries over {kv_length} keys (a cache)"))
    if pattern is None or reasons:
        raise UnsupportedAttentionError("this model can't run sequence-parallel", reasons)
    length, device = shard.length, torch.device(device)
    rule = Pattern(causal=pattern.causal, window=pattern.window, chunk=pattern.chunk)
    if shard.placement is not None:
        placed = PlacedMask(shard, rule, device)
        return placed if shard.ranks == 1 else ShardMask(shard, placed)
    segments = None if shard.segments is None else shard.segments.to(device)

    def materialise() -> torch.Tensor:
        documents = None if segments is None else segments.document_ids
        chunks = None if pattern.chunk is None else chunk_positions(length, documents, shard.padding, device)
        allowed = dense_rule(
            length,
            length,
            causal=pattern.causal,
            window=pattern.window,
            documents=documents,
            chunk=pattern.chunk,
            positions=chunks,
            padding=shard.padding,
            device=device,
        )
        return allowed.expand(shard.rows, 1, length, length)

    whole = LazyMask(
        shape=(shard.rows, 1, length, length),
        pattern=rule,
        segments=segments,
        padding=shard.padding,
        materialise=materialise,
        device=device,
        guarded=True,
    )
    return ShardMask(shard, whole)


def _crosses(pattern: Pattern | None, context: Context | None, shape: tuple[int, int]) -> bool:
    """Whether a mask may be for cross-attention; True if unknown. Causal rules and windows imply one sequence."""
    if pattern is None or pattern.causal or pattern.window is not None:
        return False
    return context is None or context.crosses or context.shape != shape


def _last_is_read(padding: torch.Tensor, pattern: Pattern | None, q_length: int, q_offset: Any, kv_offset: int) -> bool:
    """Whether the caller reads the last query of a row that is padding after real tokens (``generate`` on rows padded
    on the right). Rows that are only padding so far (padded on the left, prefilled in chunks) are not read. Spans never
    omit a single query."""
    if is_tracing() or q_length == 1 or pattern is None or not reads_last_token(causal=pattern.causal):
        return False
    last = q_offset + q_length - 1 - kv_offset
    return bool((~padding[:, last] & padding[:, :last].any(-1)).any())


def _require_last_sees_keys(dense: torch.Tensor) -> None:
    """Require that the last query of each row sees a key: kernels give different outputs for a query without keys.

    Args:
        dense: the mask, ``[B, 1, S, T]``.

    Raises:
        InvalidInputError: it sees none. Rows that are all padding are ignored.
    """
    sees_keys = dense.any(-1)[:, 0]
    if not bool((sees_keys[:, -1] | ~sees_keys.any(-1)).all()):
        text = "the last token of each row is read, which is padding, and its window holds only padding"
        raise InvalidInputError(
            "rows are padded on the right", [Reason("padding", text)], 'Set tokenizer.padding_side = "left".'
        )


def _segments(
    pattern: Pattern | None, rows: int, q_length: int, q_offset: int, kv_length: int, device: torch.device
) -> Segments | TracedSegments | None:
    context = current()
    if context is not None and context.segments is not None:
        found = cast("Segments | TracedSegments", context.documents)
        if (found.rows, found.length) != (rows, q_length) or q_offset != 0 or kv_length < q_length:
            return None
        return found.to(device)
    if pattern is None or pattern.document_ids is None:
        return None
    ids = pattern.document_ids
    return from_positions(jumping_positions(ids), None, rows, q_length)


def _padding(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor:
    """bool ``[B, T]`` for the keys in the cache, cut and padded as in Transformers: unknown keys are not real."""
    mask = attention_mask.to(torch.bool)
    if kv_offset == 0 and mask.shape[-1] == kv_length:
        return mask
    short = kv_length + kv_offset - mask.shape[-1]
    if short > 0:
        mask = torch.nn.functional.pad(mask, (0, short))
    return mask[:, kv_offset : kv_offset + kv_length]


def _same_document(segments: Segments | TracedSegments, kv_length: int) -> torch.Tensor:
    """bool ``[B, 1, S, T]``; keys past S (an empty static cache) belong to no document."""
    ids = segments.document_ids
    keys = torch.nn.functional.pad(ids, (0, kv_length - ids.shape[-1]), value=-1)
    return dense_rule(ids.shape[-1], kv_length, causal=False, documents=keys, device=ids.device).contiguous()


def _require_stems_served(pattern: Pattern | None, attention_mask: torch.Tensor | None) -> None:
    """Raise for a mask that is not defined along stems: only causal attention, its windows and chunks are."""
    reasons = []
    if pattern is None or not pattern.causal:
        reasons.append(Reason("stems", "its mask is more than causal, windowed or in chunks"))
    if attention_mask is not None:
        reasons.append(Reason("padding", "the row of shared prefixes has padding"))
    if reasons:
        raise UnsupportedAttentionError("share_prefixes=True can't serve this model", reasons, "Leave it out.")


def _along_stems(segments: Segments, pattern: Pattern | None) -> torch.Tensor:
    """Causal attention of documents with stems. Positions, windows and chunks count along stem and document.

    bool ``[B, 1, S, S]``.
    """
    at = segments.positions
    distance = at[:, :, None] - at[:, None, :]
    allowed = segments.visible & (distance >= 0)
    if pattern is not None and pattern.window is not None:
        allowed = allowed & (distance < pattern.window)
    if pattern is not None and pattern.chunk is not None:
        chunks = at // pattern.chunk
        allowed = allowed & (chunks[:, :, None] == chunks[:, None, :])
    return allowed[:, None]


def _chunks_in_documents(
    segments: Segments | TracedSegments, chunk: int, kv_length: int, padding: torch.Tensor | None = None
) -> torch.Tensor:
    """Chunked causal attention whose chunks restart in each document, at its first real token (Transformers counts from
    the row's). While a graph is traced, padding in front belongs to the first document.

    bool ``[B, 1, S, T]``.
    """
    ids = segments.document_ids
    length = ids.shape[-1]
    positions = chunk_positions(length, ids, None if padding is None else padding[:, :length], ids.device)
    keys = torch.nn.functional.pad(positions, (0, kv_length - length))
    return dense_rule(length, kv_length, causal=True, chunk=chunk, positions=keys, device=ids.device)
