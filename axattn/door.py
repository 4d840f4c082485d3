"""The door of a model: hooks that read positions, cumulative lengths and masks once, before the model's own forward.

Every `PreTrainedModel` inside a model has one `Door`. It checks the inputs, finds the documents (`Segments`) and holds
them in a thread-local slot while the forward runs, where the mask function picks them up. On native names the same door
is a guard: packed input that Transformers would leak is refused.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from axattn import flash_guard, guard, traced
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.flash_guard import FlashRules
from axattn.segments import Segments, from_cu_seqlens, from_positions
from axattn.shares import Share
from axattn.traced import TracedSegments


@dataclass(slots=True, eq=False)
class Context:
    """What the door found for the forward that is running.

    Attributes:
        segments: the documents, None when every row is one document.
        shape: (B, S) of the tokens, None when the model takes no tokens (a vision tower).
        weights: the attention weights are asked for (``output_attentions``).
        seen: the objects it was computed from, to reuse it in inner models that get the same ones.
        door: whose forward is running.
        outer: the context to go back to.
        share: the forward runs on this rank's share of its rows.
        crosses: the model also attends to another sequence (``encoder_hidden_states``).
    """

    segments: Segments | TracedSegments | None
    shape: tuple[int, int] | None
    weights: bool
    seen: tuple[Any, ...]
    door: Door
    outer: Context | None
    share: Share | None = None
    crosses: bool = False


class _Slot(threading.local):
    """What runs in this thread. A thread-local, not a context variable: torch.compile can trace it."""

    def __init__(self) -> None:
        self.context: Context | None = None
        self.share: Share | None = None
        self.told: Segments | None = None


_slot = _Slot()
_SDPA = torch.nn.functional.scaled_dot_product_attention
PACKED_CACHE = "_axattn_packed"
"""Attribute on a cache that a row of several documents has filled: True, or a bool tensor from a compiled graph."""


def current() -> Context | None:
    """The context of the innermost model that is running, None outside of any model with a door."""
    return _slot.context


@contextlib.contextmanager
def sharing(share: Share) -> Iterator[None]:
    """Doors that open inside this block find `share` in place of what their inputs say about documents and padding."""
    outer, _slot.share = _slot.share, share
    try:
        yield
    finally:
        _slot.share = outer


@contextlib.contextmanager
def telling(segments: Segments) -> Iterator[None]:
    """Doors that open inside this block take these documents in place of what their inputs say."""
    outer, _slot.told = _slot.told, segments
    try:
        yield
    finally:
        _slot.told = outer


class Door:
    """The forward pre-hook and forward hook of one `PreTrainedModel`. Picklable and copyable with its model.

    Args:
        parameters: names of the positional parameters of the model's ``forward``, in order.
        native: the native name that Transformers serves here, None for our own names.
        encoder_decoder: the model is an encoder-decoder, whose rows can't be packed.
        position_planes: how many leading planes ``position_ids`` may have (Qwen-VL: 3 or 4), () for none.
        shares_keys: some layers read the keys and values of another one.
        flash: what to look for on a flash name, None on others.
        standing: on this native name no packed call is right (`axattn.guard.standing_reasons`).
        mixers: layers that mix tokens outside of attention (`axattn.mixing`): documents would leak through them.
        counted: the first position in a row at which some layer's result depends on it (Llama 4), None for none.
        unfit: why packed rows can't be what is meant: positions that do not reach the model, one output a row.
        first_position: of a row's first token (`axattn.numbering.first_position`).
        reads_first: a head reads the first token of each row (`axattn.mixing.reads_first`).
    """

    def __init__(
        self,
        parameters: tuple[str, ...],
        *,
        native: str | None = None,
        encoder_decoder: bool = False,
        position_planes: tuple[int, ...] = (),
        shares_keys: bool = False,
        standing: bool = False,
        counted: int | None = None,
        mixers: tuple[Reason, ...] = (),
        unfit: tuple[Reason, ...] = (),
        first_position: int = 0,
        reads_first: bool = False,
        flash: FlashRules | None = None,
    ) -> None:
        self.parameters = parameters
        self.native = native
        self.encoder_decoder = encoder_decoder
        self.position_planes = position_planes
        self.shares_keys = shares_keys
        self.standing = standing
        self.counted = counted
        self.mixers = mixers
        self.unfit = unfit
        self.first_position = first_position
        self.reads_first = reads_first
        self.flash = flash

    def enter(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook (``with_kwargs=True``). Packed rows get what they lack: on a flash name the lengths of their
        documents, which Transformers' flash path reads at any batch size; positions that start anew in each."""
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs} if args else kwargs
        if self.shares_keys:
            guard.require_gradients_of_shared_keys(module)
        outer = _slot.context
        if torch.nn.functional.scaled_dot_product_attention is not _SDPA and self.native is None:
            guard.require_no_context_parallel(module)
        get = inputs.get
        seen = (get("position_ids"), get("attention_mask"), get("cu_seq_lens_q"), get("cu_seq_lens_k"))
        weights = get("output_attentions")
        if weights is None:  # a config's own attribute access costs a microsecond
            weights = module.config.__dict__.get("_output_attentions", False)
        if weights and self.native not in (None, "eager"):
            raise UnsupportedAttentionError(
                f"{self.native} can't serve {type(module).__name__}",
                [Reason("weights", "output_attentions=True (its kernel never forms the attention weights)")],
                'Use attn_implementation="auto" or "eager".',
            )
        if _slot.share is not None:
            _slot.context = Context(None, _token_shape(inputs), bool(weights), seen, self, outer, _slot.share)
            return None
        told = _slot.told
        if told is not None:
            shape = _token_shape(inputs)
            if shape != (told.rows, told.length):  # read from positions alone, two rows could be one document
                raise InvalidInputError(
                    f"{type(module).__name__} has {shape} tokens where the unpadded row has {(told.rows, told.length)}",
                    advice="Leave unpad out.",
                )
            _slot.context = Context(told if told.packed else None, shape, bool(weights), seen, self, outer)
            return None
        if (
            outer is not None
            and not weights
            and outer.segments is None
            and outer.door is not self
            and not _is_packed(get("past_key_values"))
            and (seen[0] is seen[1] is seen[2] is seen[3] is None)
            and get("encoder_hidden_states") is None
        ):
            return None  # an inner model with nothing to read: the outer door has looked, and its context holds
        if outer is not None and _same(seen, outer.seen):
            segments, shape = outer.segments, outer.shape
        else:
            segments, shape = self._read(module, inputs, seen, outer)
        added: dict[str, Any] = {}
        if segments is not None:
            if self.flash is not None and self.flash.takes_lengths and isinstance(segments, Segments):
                added = flash_guard.lengths_of(segments)
            if seen[0] is None and not self.position_planes and "position_ids" in self.parameters[len(args) :]:
                added["position_ids"] = segments.positions + self.first_position
                seen = (added["position_ids"], *seen[1:])
        crosses = get("encoder_hidden_states") is not None
        _slot.context = Context(segments, shape, bool(weights), seen, self, outer, crosses=crosses)
        return (args, {**kwargs, **added}) if added else None

    def reached(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an attention module on a flash name: have the documents come this far, and as such?"""
        if self.native is None:
            return
        flash_guard.require_plain_positions(self.native, module, kwargs)
        context = _slot.context
        if context is not None and isinstance(context.segments, Segments):
            flash_guard.require_reached(self.native, module, kwargs, context.segments)

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook (``always_call=True``): also runs when the forward raised."""
        context = _slot.context
        if context is None or context.door is not self:  # `enter` raised: nothing was set
            return
        _slot.context = context.outer
        if context.segments is not None:
            cache = getattr(output, "past_key_values", None)
            if cache is not None and not isinstance(cache, tuple):
                packed: Any = True
                if isinstance(context.segments, TracedSegments):
                    packed = (context.segments.document_ids[:, -1] > 0).any()
                setattr(cache, PACKED_CACHE, packed)

    def documents(self, module: torch.nn.Module, inputs: dict[str, Any]) -> Segments | None:
        """The documents that a model's inputs describe, None when every row is one; checks as `enter` does."""
        get = inputs.get
        seen = (get("position_ids"), get("attention_mask"), get("cu_seq_lens_q"), get("cu_seq_lens_k"))
        segments, _ = self._read(module, inputs, seen, None)
        return segments if isinstance(segments, Segments) else None

    # ---- reading ------------------------------------------------------------------------------------------------

    def _read(
        self, module: torch.nn.Module, inputs: dict[str, Any], seen: tuple[Any, ...], outer: Context | None
    ) -> tuple[Segments | TracedSegments | None, tuple[int, int] | None]:
        positions, mask, cu_q, cu_k = seen
        cache = inputs.get("past_key_values")
        if _is_packed(cache):
            raise InvalidInputError(
                "this cache was filled by a row of several documents",
                [Reason("segments", "a token decoded from it would attend to all of them")],
                "Prefill each document in a row of its own (left-padded) before decoding.",
            )
        shape = _token_shape(inputs)
        if shape is None:
            return None, None
        if self.flash is not None and self.native is not None:
            flash_guard.require_served(self.native, module, inputs, self.flash)
        if self.native == "flex_attention":
            guard.require_flex_on_cpu(module, inputs, _length(cache))
        rows, length = shape
        if rows == 0 or length == 0:
            raise InvalidInputError(
                f"the batch is empty: {rows} rows of {length} tokens", advice="Give at least one row with one token."
            )
        if positions is mask is cu_q is cu_k is None:
            return (outer.segments if outer is not None and outer.shape == shape else None), shape
        finished = mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2)
        if finished and self.native is not None and isinstance(mask, torch.Tensor):
            guard.require_mask_is_read(self.native, module, mask)
        mask = None if finished else mask
        if self.reads_first and mask is not None and self.native not in ("eager", "sdpa"):
            self._require_first_is_real(module, mask)
        if torch.compiler.is_compiling():
            return self._trace(module, inputs, seen, rows, length, finished), shape
        if cu_q is not None or cu_k is not None:
            segments = self._from_lengths(cu_q, cu_k, rows, length)
        else:
            positions = self._text_positions(positions, rows, length)
            if finished:  # a 4-D mask (the user's own, or one that `generate` built before) already says it all
                return None, shape
            inside = mask if mask is not None and mask.shape[-1] == length else None
            decodes = cache is not None or bool(inputs.get("use_cache"))  # `generate` counts from 0 in any model
            if positions is not None and self.first_position and not decodes:
                self._require_counted_from_first(module, positions, inside)
            segments = None
            if positions is not None or inside is not None:
                segments = from_positions(positions, inside, rows, length)
        if segments is not None and not segments.packed:
            segments = None
        if segments is not None:
            self._check_packed(module, inputs, segments, cache, mask)
        return segments, shape

    def _trace(
        self,
        module: torch.nn.Module,
        inputs: dict[str, Any],
        seen: tuple[Any, ...],
        rows: int,
        length: int,
        finished: bool,
    ) -> TracedSegments | None:
        """The documents while a graph is traced; checks that need values run with the graph."""
        positions, mask, cu_q, cu_k = seen
        segments: TracedSegments | None
        if cu_q is not None or cu_k is not None:
            segments = traced.from_cu_seqlens(cu_q if cu_q is not None else cu_k, rows, length, "cu_seq_lens_q")
            if cu_q is not None and cu_k is not None and cu_q is not cu_k:
                torch._assert_async((cu_q == cu_k).all(), "axattn: cu_seq_lens_q and cu_seq_lens_k differ")
        else:
            positions = self._text_positions(positions, rows, length)
            if finished:
                return None
            inside = mask if mask is not None and mask.shape[-1] == length else None
            if positions is not None and self.first_position:
                low = positions if inside is None else positions.masked_fill(inside == 0, self.first_position)
                text = f"axattn: position_ids start at {self.first_position} in this model (padding_idx + 1)"
                torch._assert_async((low >= self.first_position).all(), text)
            segments = traced.from_positions(positions, inside, rows, length)
        if segments is None:
            return None
        cache = inputs.get("past_key_values")
        length_so_far = 0 if cache is None else cache.get_seq_length()
        filled = isinstance(length_so_far, torch.Tensor) or length_so_far > 0
        leaks = self.native is not None and guard.may_leak(self.native, module, inputs, self.standing)
        counted = self.counted is not None and length > self.counted
        if self.encoder_decoder or filled or leaks or counted or self.mixers or self.unfit:
            single = (segments.document_ids == 0).all()
            torch._assert_async(single, "axattn: packed rows would leak here; run without torch.compile to see why")
        return segments

    @staticmethod
    def _from_lengths(cu_q: Any, cu_k: Any, rows: int, length: int) -> Segments:
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

    def _text_positions(self, positions: Any, rows: int, length: int) -> torch.Tensor | None:
        """The text positions ``[B or 1, S]`` in ``position_ids``, None when there are none to read documents from."""
        if not isinstance(positions, torch.Tensor):
            return None
        shape = positions.shape
        if positions.is_floating_point() or positions.dtype == torch.bool:
            dtype = str(positions.dtype).removeprefix("torch.")
            raise InvalidInputError(f"position_ids have dtype {dtype}", advice="Positions are integers (torch.long).")
        if positions.ndim == 3 and self.position_planes:
            if shape[0] in self.position_planes and shape[1] in (1, rows) and shape[2] == length:
                return positions[0] if shape[0] == 4 else None
        elif positions.ndim == 2 and shape[0] in (1, rows) and shape[1] == length:
            return positions
        elif positions.ndim == 1 and shape[0] == length:
            return positions[None]
        legal = f"[{rows}, {length}] or [1, {length}]"  # not before: text of a length would be a graph for each length
        if positions.ndim == 3 and self.position_planes:
            legal = f"[{'|'.join(map(str, self.position_planes))}, {rows}, {length}]"
        raise InvalidInputError(
            f"position_ids have shape {list(shape)}, but the batch has {rows} rows of {length} tokens",
            advice=f"This model takes {legal}.",
        )

    @staticmethod
    def _require_first_is_real(module: torch.nn.Module, mask: torch.Tensor) -> None:
        """What a kernel gives for padding is not what eager attention gives; a head must not read it."""
        text = f"{type(module).__name__} reads the first token of each row"
        if torch.compiler.is_compiling():
            torch._assert_async((mask[:, 0] != 0).all(), f"axattn: {text}, and rows are padded on the left")
        elif not bool((mask[:, 0] != 0).all()):
            raise InvalidInputError(
                "rows are padded on the left",
                [Reason("padding", f"{text}, which is padding")],
                'Set tokenizer.padding_side = "right".',
            )

    def _require_counted_from_first(
        self, module: torch.nn.Module, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """RoBERTa and its kin count from ``padding_idx + 1``; positions below are those of padding, or of no token."""
        real = positions if mask is None else positions.expand(mask.shape)[mask != 0]
        low = int(real.min()) if real.numel() else self.first_position
        if low < self.first_position:
            raise InvalidInputError(
                f"position_ids start at {low}, but {type(module).__name__} counts from {self.first_position}",
                [Reason("position_ids", f"position {self.first_position - 1} is that of padding")],
                f"Give position_ids + {self.first_position - low} (PackingCollator takes first_position).",
            )

    def _check_packed(
        self, module: torch.nn.Module, inputs: dict[str, Any], segments: Segments, cache: Any, mask: Any
    ) -> None:
        if self.encoder_decoder:
            raise InvalidInputError(
                "packed rows were given to an encoder-decoder model",
                [Reason("segments", "its cross-attention has no document boundaries")],
                "Give it one document a row, padded.",
            )
        if cache is not None and _length(cache) > 0:
            raise InvalidInputError(
                "packed rows can't continue from a cache",
                [Reason("segments", f"the cache already holds {_length(cache)} tokens of unknown documents")],
                "Pass past_key_values=None, or one document a row.",
            )
        if self.mixers:
            raise UnsupportedAttentionError(
                f"packed rows would leak in {type(module).__name__}",
                self.mixers,
                "Give it one document a row, padded.",
            )
        if self.unfit:
            raise UnsupportedAttentionError(
                f"packed rows can't run in {type(module).__name__}",
                self.unfit,
                "Give it one document a row, padded.",
            )
        if self.counted is not None and segments.length > self.counted:
            text = f"its layers without RoPE scale queries by their position in the row, from {self.counted} on"
            raise UnsupportedAttentionError(
                f"{type(module).__name__} can't take packed rows of {segments.length} tokens",
                [Reason("segments", text)],
                f"Pack into rows of at most {self.counted} tokens.",
            )
        if self.native is not None:
            follow = self.flash is not None and self.flash.takes_lengths
            guard.require_no_leak(self.native, module, inputs, segments, mask, lengths_follow=follow)


def _is_packed(cache: Any) -> bool:
    return cache is not None and bool(getattr(cache, PACKED_CACHE, False))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    some = False
    for x, y in zip(a, b, strict=True):
        if x is not y:
            return False
        some = some or x is not None
    return some


def _token_shape(inputs: dict[str, Any]) -> tuple[int, int] | None:
    ids = inputs.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return (ids.shape[0], ids.shape[1]) if ids.ndim == 2 else None
    embeds = inputs.get("inputs_embeds")
    if isinstance(embeds, torch.Tensor) and embeds.ndim == 3:
        return embeds.shape[0], embeds.shape[1]
    return None


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
