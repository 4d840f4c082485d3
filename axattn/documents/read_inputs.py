"""What the inputs of a model's forward say of its documents, read once by its input hook; in a graph, while it is
traced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from axattn.documents import inputs, mrope, native_flash_guard, native_guard, traced
from axattn.documents.boundaries import Segments, from_positions, has_numbers
from axattn.documents.forward_context import BoundaryInputs, Context, current
from axattn.documents.traced import TracedSegments
from axattn.documents.wrapper_positions import require_handed_on
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.hf import callers
from axattn.hf.caches import cache_length, is_packed
from axattn.hf.forward_inputs import caches_of, token_shape, unknown_tensors
from axattn.hf.torch_internals import is_mapped, is_tracing, require_when_run
from axattn.traits.model_traits import ModelTraits


class Found(NamedTuple):
    """What the inputs of a forward say.

    Attributes:
        segments: the documents, None when every row is one.
        shape: (B, S) of the tokens, None when there are none.
        numbered: their 2-D mask numbers documents (in a graph: it may).
    """

    segments: Segments | TracedSegments | None
    shape: tuple[int, int] | None
    numbered: bool = False


def described(given: dict[str, Any], outer: Context | None) -> BoundaryInputs:
    """The inputs that say which tokens belong together.

    Args:
        given: the inputs, by name.
        outer: what the input hook around this one found: where it put a plain mask in the place of one that numbers
            documents, the latter is meant.
    """
    get = given.get
    mask = get("attention_mask")
    if mask is not None and outer is not None and mask is outer.zero_one_mask:
        mask = outer.bounds.mask
    return BoundaryInputs(get("position_ids"), mask, get("cu_seq_lens_q"), get("cu_seq_lens_k"), get("seq_idx"))


def zero_one_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask of 0 and 1 for one that numbers documents: models multiply by its values (layers with a state, ESM's
    embeddings, the loss that balances experts), and take sums of it for lengths."""
    return (mask != 0).to(mask.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # traced by itself it would find nothing to read
def documents(traits: ModelTraits, module: torch.nn.Module, given: dict[str, Any]) -> Segments | None:
    """The documents that a model's inputs describe, None when every row is one; checks as `read` does. Never traced."""
    segments = read(traits, module, given, described(given, current()), None).segments
    return segments if isinstance(segments, Segments) else None


def read(
    traits: ModelTraits, module: torch.nn.Module, given: dict[str, Any], bounds: BoundaryInputs, outer: Context | None
) -> Found:
    """The documents of a forward, read in its inputs.

    Args:
        traits: about the model.
        module: the model.
        given: its inputs, by name.
        bounds: what `described` finds in them.
        outer: what the input hook around this one found.

    Raises:
        InvalidInputError: inputs that can't be read, or say two things.
        UnsupportedAttentionError: what they mean would be lost on the way to this model's kernels.
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
    if positions is cu_q is cu_k is None and outer is None and length > 1 and not is_tracing():
        require_handed_on(module, rows, length)
    unknown = unknown_tensors(given, rows, length)
    if unknown:
        mask_here = mask if isinstance(mask, torch.Tensor) and tuple(mask.shape) == shape else None
        inputs.require_known(module, unknown, mask_here, rows, length)
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
        if finished:  # a 4-D mask (the user's own, or one that `generate` built before) already says it all
            return Found(None, shape)
        if index is not None:
            mask = inputs.numbers_of(index, mask, rows, length)
        if positions is not None and traits.first_position and not _decodes(given):
            inputs.require_counted_from(traits.first_position, module, positions, mask)
    # inside of a model that was given numbers for these tokens, a mask that is made of theirs has them no more
    numbers = outer if outer is not None and outer.zero_one_mask is not None and outer.shape == shape else None
    given_mask = None if finished or length == 1 else bounds.mask
    numbered = given_mask is not None and (is_tracing() or has_numbers(given_mask))
    if is_tracing():
        if numbers is not None:
            return Found(numbers.documents, shape, numbered)
        if lengths:
            in_graph: TracedSegments | None = _traced_lengths(cu_q, cu_k, rows, length)
        else:
            in_graph = traced.from_positions(positions, mask, rows, length)
        if in_graph is not None and traits.by_document:
            in_graph.require_single("packed rows can't run document by document in a graph; run without torch.compile")
        elif in_graph is not None and not _packable_in_graph(traits, module, given, length, unknown):
            in_graph.require_single("packed rows would leak here; run without torch.compile to see why")
        where = given.get("position_ids")
        if in_graph is not None and traits.rope_scaling_threshold is not None and isinstance(where, torch.Tensor):
            text = f"dynamic NTK would stretch packed rows with positions above {traits.rope_scaling_threshold - 1}"
            in_graph.require_single(text, unless=where.max() < traits.rope_scaling_threshold)
        return Found(in_graph, shape, numbered)
    segments: Segments | None = None
    if lengths:
        segments = inputs.documents_of_lengths(cu_q, cu_k, rows, length)
    elif positions is not None or mask is not None:
        segments = from_positions(positions, mask, rows, length, numbered if index is None else None)
    if (segments is None or not segments.packed) and numbers is not None:
        above = numbers.segments
        segments = above.read() if isinstance(above, TracedSegments) else above
    if segments is None or not segments.packed:
        return Found(None, shape, numbered)
    plain_mask = not lengths and not numbered and index is None and mask is not None
    if plain_mask and positions is not None and _counts_on(positions, mask):
        return Found(None, shape, numbered)
    inputs.require_mask_fits(bounds.mask if not finished else None, length, caches)
    inputs.require_packable(traits, module, given, segments, unknown, None if finished else bounds.mask)
    return Found(segments, shape, numbered)


def _counts_on(positions: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether ``generate`` without a cache counts its new tokens on from the last position, behind a row padded on the
    right that of padding (transformers 5.17; newer ones count real tokens). No rows of several documents."""
    positions, mask = torch.broadcast_tensors(positions.reshape(-1, mask.shape[-1]), mask)  # type: ignore[no-untyped-call]  # torch 2.13
    real = mask != 0
    jumps = (positions[:, 1:] != positions[:, :-1] + 1) & real[:, 1:] & (real.cumsum(-1)[:, :-1] > 0)
    return callers.generates() and not bool(jumps.any())


def _text_positions(
    traits: ModelTraits, positions: Any, mask: torch.Tensor | None, shape: tuple[int, int], outer: Context | None
) -> torch.Tensor | None:
    """`inputs.text_positions`; of planes without one of text, if a user gives them, what tells the documents."""
    text = inputs.text_positions(positions, *shape, traits.mrope_planes)
    if text is None and outer is None and isinstance(positions, torch.Tensor):
        return mrope.text_positions(positions, mask)
    return text


def _decodes(given: dict[str, Any]) -> bool:
    """Whether the forward may be a step of ``generate``, which counts positions from 0 in any model."""
    return bool(given.get("use_cache") or caches_of(given))


def _traced_lengths(cu_q: Any, cu_k: Any, rows: int, length: int) -> TracedSegments:
    """As `inputs.documents_of_lengths`, while a graph is traced: that they are equal is asserted when it runs."""
    if cu_q is not None and cu_k is not None and cu_q is not cu_k:
        require_when_run((cu_q == cu_k).all(), "cu_seq_lens_q and cu_seq_lens_k differ")
    return traced.from_cu_seqlens(cu_q if cu_q is not None else cu_k, rows, length, "cu_seq_lens_q")


def _packable_in_graph(
    traits: ModelTraits, module: torch.nn.Module, given: dict[str, Any], length: int, unknown: Iterable[str]
) -> bool:
    """Whether packed rows are right in this graph, which reads no value."""
    if any(True for _ in inputs.refusals(traits, module, given, length, unknown)):
        return False
    if traits.rope_scaling_threshold is not None and length > traits.rope_scaling_threshold:
        return False
    return traits.native is None or not native_guard.may_leak(
        traits.native, module, given, traits.never_packs, traits.image_blocks
    )
