"""Reads the documents of a forward from its inputs, once per forward for the input hook; in a graph, while tracing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from axattn.documents import inputs, mrope, native_flash_guard, native_guard, traced
from axattn.documents.boundaries import Segments, from_positions, holds_document_ids
from axattn.documents.forward_context import BoundaryInputs, Context, current
from axattn.documents.traced import TracedSegments
from axattn.documents.wrapper_positions import require_positions_passed_on
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.hf import callers
from axattn.hf.caches import cache_length, is_packed
from axattn.hf.forward_inputs import caches_of, token_shape, unknown_tensors
from axattn.hf.torch_internals import is_mapped, is_tracing, require_when_run
from axattn.traits.model_traits import ModelTraits


class Found(NamedTuple):
    """The documents found in the inputs of a forward.

    Attributes:
        segments: the documents, None when every row is one.
        shape: (B, S) of the tokens, None when there are none.
        has_document_ids: the 2-D mask holds document ids (in a graph: it may).
    """

    segments: Segments | TracedSegments | None
    shape: tuple[int, int] | None
    has_document_ids: bool = False


def boundary_inputs(given: dict[str, Any], outer: Context | None) -> BoundaryInputs:
    """The inputs that describe document boundaries.

    Args:
        given: the inputs, by name.
        outer: the context of the input hook around this one. If that one replaced a mask of document ids by a 0/1 mask,
            the original is returned.
    """
    get = given.get
    mask = get("attention_mask")
    if mask is not None and outer is not None and mask is outer.zero_one_mask:
        mask = outer.bounds.mask
    return BoundaryInputs(get("position_ids"), mask, get("cu_seq_lens_q"), get("cu_seq_lens_k"), get("seq_idx"))


def zero_one_mask(mask: torch.Tensor) -> torch.Tensor:
    """The 0/1 mask for a mask of document ids: models multiply by its values (recurrent layers, ESM's embeddings, the
    load balancing loss of experts), and use its sums as lengths."""
    return (mask != 0).to(mask.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # tracing it alone would find nothing to read
def documents(traits: ModelTraits, module: torch.nn.Module, given: dict[str, Any]) -> Segments | None:
    """The documents that a model's inputs describe, None when every row is one. Checks like `read`. Never traced."""
    segments = read(traits, module, given, boundary_inputs(given, current()), None).segments
    return segments if isinstance(segments, Segments) else None


def read(
    traits: ModelTraits, module: torch.nn.Module, given: dict[str, Any], bounds: BoundaryInputs, outer: Context | None
) -> Found:
    """The documents of a forward, read from its inputs.

    Args:
        traits: the traits of the model.
        module: the model.
        given: its inputs, by name.
        bounds: what `boundary_inputs` returns for them.
        outer: the context of the input hook around this one.

    Raises:
        InvalidInputError: inputs that are invalid, or contradict each other.
        UnsupportedAttentionError: this model's kernels would not get what they describe.
    """
    positions, mask, cu_q, cu_k, index = bounds
    caches = caches_of(given)
    if any(map(is_packed, caches)):
        raise InvalidInputError(
            "this cache was filled by a row of several documents",
            [Reason("segments", "a token decoded from it would attend to all of them")],
            "Prefill each document in a row of its own (left-padded) before decoding.",
        )
    shape = token_shape(given)
    if shape is None:
        return Found(None, None)
    if traits.on_flash and traits.native is not None:
        native_flash_guard.require_served(
            traits.native,
            given,
            traits.windowed,
            image_blocks=traits.image_blocks,
            reads_padding="every" in traits.reads,
        )
    if traits.native == "flex_attention":
        native_guard.require_flex_on_cpu(module, given, max(map(cache_length, caches), default=0))
    rows, length = shape
    if rows == 0 or length == 0:
        raise InvalidInputError(
            f"the batch is empty: {rows} rows of {length} tokens", advice="Give at least one row with one token."
        )
    if positions is cu_q is cu_k is None and outer is None and length > 1 and not torch.compiler.is_compiling():
        require_positions_passed_on(module, rows, length)
    unknown = unknown_tensors(given, rows, length)
    if unknown:
        mask_here = mask if isinstance(mask, torch.Tensor) and tuple(mask.shape) == shape else None
        inputs.require_no_hidden_documents(module, unknown, mask_here, rows, length)
    if bounds.nothing:
        return Found(outer.documents if outer is not None and outer.shape == shape else None, shape)
    if (
        mask is None
        and isinstance(positions, torch.Tensor)
        and not torch.compiler.is_compiling()
        and is_mapped(positions)
    ):
        raise UnsupportedAttentionError(
            f"{type(module).__name__} can't run this batch under torch.func.vmap",
            [Reason("position_ids", "Transformers reads the values of position_ids where there is no attention_mask")],
            "Give an attention_mask of ones beside them.",
        )
    finished = mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2)
    if finished and traits.native is not None and isinstance(mask, torch.Tensor):
        native_guard.require_mask_is_read(traits.native, module, mask)
    mask = None if finished else mask
    if traits.first_must_be_real and mask is not None:
        inputs.require_first_is_real(traits.first_must_be_real, mask)
    lengths = cu_q is not None or cu_k is not None
    if not lengths:
        mask = inputs.mask_of_tokens(mask, length, caches)
        positions = _text_positions(traits, positions, mask, shape, outer)
        if finished:  # a 4-D mask (the user's own, or one that `generate` built) is complete
            return Found(None, shape)
        if index is not None:
            mask = inputs.document_ids_of(index, mask, rows, length)
        if positions is not None and traits.first_position and not _decodes(given):
            inputs.require_counted_from(traits.first_position, module, positions, mask)
    # inside a model that was given document ids for these tokens, a mask derived from them is 0/1
    outer_with_ids = outer if outer is not None and outer.zero_one_mask is not None and outer.shape == shape else None
    given_mask = None if finished or length == 1 else bounds.mask
    has_document_ids = given_mask is not None and (is_tracing() or holds_document_ids(given_mask))
    if is_tracing():
        if outer_with_ids is not None:
            return Found(outer_with_ids.documents, shape, has_document_ids)
        if lengths:
            in_graph: TracedSegments | None = _traced_lengths(cu_q, cu_k, rows, length)
        else:
            in_graph = traced.from_positions(positions, mask, rows, length)
        if in_graph is not None and traits.by_document:
            in_graph.require_single("packed rows can't run document by document in a graph; run without torch.compile")
        elif in_graph is not None and not _packable_in_graph(traits, module, given, length, unknown):
            in_graph.require_single("packed rows would leak here; run without torch.compile to see why")
        given_ids = given.get("position_ids")
        if in_graph is not None and traits.rope_scaling_threshold is not None and isinstance(given_ids, torch.Tensor):
            text = f"dynamic NTK would scale packed rows with positions above {traits.rope_scaling_threshold - 1}"
            in_graph.require_single(text, unless=given_ids.max() < traits.rope_scaling_threshold)
        return Found(in_graph, shape, has_document_ids)
    segments: Segments | None = None
    if lengths:
        segments = inputs.documents_of_lengths(cu_q, cu_k, rows, length)
    elif positions is not None or mask is not None:
        segments = from_positions(positions, mask, rows, length, has_document_ids if index is None else None)
    if (segments is None or not segments.packed) and outer_with_ids is not None:
        outer_segments = outer_with_ids.segments
        segments = outer_segments.read() if isinstance(outer_segments, TracedSegments) else outer_segments
    if segments is None or not segments.packed:
        return Found(None, shape, has_document_ids)
    only_padding = not lengths and not has_document_ids and index is None and mask is not None
    if only_padding and positions is not None and _generate_continues(positions, mask):
        return Found(None, shape, has_document_ids)
    inputs.require_mask_fits(bounds.mask if not finished else None, length, caches)
    inputs.require_packable(traits, module, given, segments, unknown, None if finished else bounds.mask)
    return Found(segments, shape, has_document_ids)


def _generate_continues(positions: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether positions jump only because ``generate`` without a cache counts new tokens from the last position, which
    is padding's in a row padded on the right (transformers 5.17; newer versions count real tokens)."""
    positions, mask = torch.broadcast_tensors(positions.reshape(-1, mask.shape[-1]), mask)  # type: ignore[no-untyped-call]  # torch 2.13
    real = mask != 0
    jumps = (positions[:, 1:] != positions[:, :-1] + 1) & real[:, 1:] & (real.cumsum(-1)[:, :-1] > 0)
    return callers.generates() and not bool(jumps.any())


def _text_positions(
    traits: ModelTraits, positions: Any, mask: torch.Tensor | None, shape: tuple[int, int], outer: Context | None
) -> torch.Tensor | None:
    """`inputs.text_positions`; for a user's planes without a text plane, `mrope.text_positions`."""
    text = inputs.text_positions(positions, *shape, traits.mrope_planes)
    if text is None and outer is None and isinstance(positions, torch.Tensor):
        return mrope.text_positions(positions, mask)
    return text


def _decodes(given: dict[str, Any]) -> bool:
    """Whether the forward may be a step of ``generate``, which counts positions from 0 for every model."""
    return bool(given.get("use_cache") or caches_of(given))


def _traced_lengths(cu_q: Any, cu_k: Any, rows: int, length: int) -> TracedSegments:
    """`inputs.documents_of_lengths` while a graph is traced; the graph asserts that both lengths are equal."""
    if cu_q is not None and cu_k is not None and cu_q is not cu_k:
        require_when_run((cu_q == cu_k).all(), "cu_seq_lens_q and cu_seq_lens_k differ")
    return traced.from_cu_seqlens(cu_q if cu_q is not None else cu_k, rows, length, "cu_seq_lens_q")


def _packable_in_graph(
    traits: ModelTraits, module: torch.nn.Module, given: dict[str, Any], length: int, unknown: Iterable[str]
) -> bool:
    """Whether packed rows are computed correctly in this graph, whatever the values of its tensors."""
    if any(True for _ in inputs.refusals(traits, module, given, length, unknown)):
        return False
    if traits.rope_scaling_threshold is not None and length > traits.rope_scaling_threshold:
        return False
    return traits.native is None or not native_guard.may_leak(
        traits.native, module, given, traits.never_packs, traits.image_blocks
    )
