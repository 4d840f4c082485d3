"""The door of a model: hooks that read positions, cumulative lengths and masks once, before the model's own forward.

Every `PreTrainedModel` inside a model has one `Door`. It checks the inputs, finds the documents (`Segments`) and holds
them in the thread's slot (`axattn.context`) while the forward runs, where the mask function picks them up. On native
names the same door is a guard: packed input that Transformers would leak is refused.
"""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

import torch

from axattn import flash_guard, guard, inputs, planes, traced
from axattn.context import Context, current, slot
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.facts import Facts
from axattn.handed_on import require_handed_on
from axattn.numbering import counted
from axattn.segments import Segments, from_positions
from axattn.traced import TracedSegments

_SDPA = torch.nn.functional.scaled_dot_product_attention
_READ = ("position_ids", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k")
"""The inputs that say which tokens belong together."""


class Door:
    """The forward pre-hook and forward hook of one `PreTrainedModel`. Picklable and copyable with its model.

    Args:
        facts: about the model.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def enter(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook (``with_kwargs=True``). Packed rows get what they lack: on a flash name the lengths of their
        documents, which Transformers' flash path reads at any batch size; positions that start anew in each."""
        facts = self.facts
        given = {**dict(zip(facts.parameters, args, strict=False)), **kwargs} if args else kwargs
        if facts.shares_keys:
            guard.require_gradients_of_shared_keys(module)
        here, outer = slot(), current()
        if torch.nn.functional.scaled_dot_product_attention is not _SDPA and facts.native is None:
            guard.require_no_context_parallel(module)
        get = given.get
        seen = (get("position_ids"), get("attention_mask"), get("cu_seq_lens_q"), get("cu_seq_lens_k"))  # `_READ`
        unchanged: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        if outer is not None and _speaks_of(outer, seen[2]) and inputs.token_shape(given) is None:
            # the lengths of the text, which a vision tower is given too (transformers 5.17)
            kwargs = {name: value for name, value in kwargs.items() if name not in flash_guard.LENGTHS}
            seen, unchanged = (*seen[:2], None, None), (args, kwargs)
        weights = get("output_attentions")
        if weights is None:  # a config's own attribute access costs a microsecond
            weights = module.config.__dict__.get("_output_attentions", False)
        if weights and facts.native not in (None, "eager"):
            raise UnsupportedAttentionError(
                f"{facts.native} can't serve {type(module).__name__}",
                [Reason("weights", "output_attentions=True (its kernel never forms the attention weights)")],
                'Use attn_implementation="auto" or "eager".',
            )
        if here.share is not None:
            shape = inputs.token_shape(given)
            here.context = Context(None, shape, bool(weights), seen, self, outer, here.share, caller=_caller())
            return unchanged
        told = here.told
        if told is not None:
            shape = inputs.token_shape(given)
            if shape != (told.rows, told.length):  # read from positions alone, two rows could be one document
                raise InvalidInputError(
                    f"{type(module).__name__} has {shape} tokens where the unpadded row has {(told.rows, told.length)}",
                    advice="Leave unpad out.",
                )
            packed = told if told.packed else None
            here.context = Context(packed, shape, bool(weights), seen, self, outer, caller=_caller())
            return unchanged
        if (
            outer is not None
            and not weights
            and outer.segments is None
            and outer.door is not self
            and not inputs.is_packed(get("past_key_values"))
            and (seen[0] is seen[1] is seen[2] is seen[3] is None)
            and get("encoder_hidden_states") is None
        ):
            return unchanged  # an inner model with nothing to read: the outer door has looked, and its context holds
        if outer is not None and _same(seen, outer.seen):
            segments, shape = outer.segments, outer.shape
        else:
            segments, shape = self._read(module, given, seen, outer)
        added: dict[str, Any] = {}
        if segments is not None:
            flattened = bool(facts.position_planes) and planes.lacks_planes(given)
            lengths = None
            if (flattened or facts.flash is not None) and facts.takes_lengths and isinstance(segments, Segments):
                lengths = added = flash_guard.lengths_of(segments)
                seen = (*seen[:2], lengths["cu_seq_lens_q"], lengths["cu_seq_lens_k"])
            if flattened:
                if isinstance(segments, TracedSegments):
                    segments.require_single("packed rows with images need position_ids of 3 or 4 planes in a graph")
                else:
                    args, added = planes.left_to_model(module, facts.parameters, args, lengths)
                    seen = (None, *seen[1:])
            elif seen[0] is None and not facts.position_planes and "position_ids" in facts.parameters[len(args) :]:
                added["position_ids"] = self._positions(segments, given, seen)
                seen = (added["position_ids"], *seen[1:])
        crosses = get("encoder_hidden_states") is not None
        reads_padding = facts.reads_padding or (outer is not None and outer.reads_padding)
        here.context = Context(
            segments,
            shape,
            bool(weights),
            seen,
            self,
            outer,
            crosses=crosses,
            reads_padding=reads_padding,
            caller=_caller(),
        )
        return (args, {**kwargs, **added}) if added else unchanged

    def reached(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an attention module on a flash name: have the documents come this far, and as such?"""
        if self.facts.native is None:
            return
        flash_guard.require_plain_positions(self.facts.native, module, args, kwargs)
        context = current()
        if context is not None and isinstance(context.segments, Segments):
            flash_guard.require_reached(self.facts.native, module, kwargs, context.segments)

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook (``always_call=True``): also runs when the forward raised."""
        here = slot()
        context = here.context
        if context is None or context.door is not self:  # `enter` raised: nothing was set
            return
        here.context = context.outer
        if context.segments is not None:
            cache = getattr(output, "past_key_values", None)
            if cache is not None and not isinstance(cache, tuple):
                packed: Any = True
                if isinstance(context.segments, TracedSegments):
                    packed = (context.segments.document_ids[:, -1] > 0).any()
                setattr(cache, inputs.PACKED_CACHE, packed)

    def documents(self, module: torch.nn.Module, given: dict[str, Any]) -> Segments | None:
        """The documents that a model's inputs describe, None when every row is one; checks as `enter` does."""
        segments, _ = self._read(module, given, tuple(map(given.get, _READ)), None)
        return segments if isinstance(segments, Segments) else None

    def _positions(
        self, segments: Segments | TracedSegments, given: dict[str, Any], seen: tuple[Any, ...]
    ) -> torch.Tensor:
        """int64 ``[B, S]`` that start anew in each document; in a graph that may not be packed at all, else the model's
        own count."""
        facts = self.facts
        anew: torch.Tensor = segments.positions + facts.first_position
        if isinstance(segments, Segments) or seen[2] is not None or seen[3] is not None:
            return anew
        own = counted(facts.first_position, facts.counts_mask, given.get("input_ids"), seen[1])
        return torch.where((segments.document_ids[:, -1] > 0).any(), anew, own)

    # ---- reading ------------------------------------------------------------------------------------------------

    def _read(
        self, module: torch.nn.Module, given: dict[str, Any], seen: tuple[Any, ...], outer: Context | None
    ) -> tuple[Segments | TracedSegments | None, tuple[int, int] | None]:
        facts = self.facts
        positions, mask, cu_q, cu_k = seen
        cache = given.get("past_key_values")
        if inputs.is_packed(cache):
            raise InvalidInputError(
                "this cache was filled by a row of several documents",
                [Reason("segments", "a token decoded from it would attend to all of them")],
                "Prefill each document in a row of its own (left-padded) before decoding.",
            )
        shape = inputs.token_shape(given)
        if shape is None:
            return None, None
        if facts.flash is not None and facts.native is not None:
            flash_guard.require_served(facts.native, module, given, facts.flash)
        if facts.native == "flex_attention":
            guard.require_flex_on_cpu(module, given, inputs.cache_length(cache))
        rows, length = shape
        if rows == 0 or length == 0:
            raise InvalidInputError(
                f"the batch is empty: {rows} rows of {length} tokens", advice="Give at least one row with one token."
            )
        if positions is cu_q is cu_k is None and outer is None and length > 1 and not torch.compiler.is_compiling():
            require_handed_on(module, rows)
        if positions is mask is cu_q is cu_k is None:
            return (outer.segments if outer is not None and outer.shape == shape else None), shape
        finished = mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2)
        if finished and facts.native is not None and isinstance(mask, torch.Tensor):
            guard.require_mask_is_read(facts.native, module, mask)
        mask = None if finished else mask
        if facts.reads_first and mask is not None and facts.native not in ("eager", "sdpa"):
            inputs.require_first_is_real(module, mask)
        if torch.compiler.is_compiling():
            return self._trace(module, given, seen, rows, length, finished, outer), shape
        if cu_q is not None or cu_k is not None:
            segments = inputs.documents_of_lengths(cu_q, cu_k, rows, length)
        else:
            positions = self._text_positions(positions, rows, length, outer)
            if finished:  # a 4-D mask (the user's own, or one that `generate` built before) already says it all
                return None, shape
            inside = inputs.mask_of_tokens(mask, length, given.get("past_key_values"))
            if positions is not None and facts.first_position and not _decodes(given):
                inputs.require_counted_from(facts.first_position, module, positions, inside)
            segments = None
            if positions is not None or inside is not None:
                segments = from_positions(positions, inside, rows, length)
        if segments is not None and not segments.packed:
            segments = None
        if segments is not None:
            inputs.require_packable(facts, module, given, segments, cache, mask)
        return segments, shape

    def _text_positions(self, positions: Any, rows: int, length: int, outer: Context | None) -> torch.Tensor | None:
        """`inputs.text_positions`; of planes without one of text, if a user gives them, what tells the documents."""
        text = inputs.text_positions(positions, rows, length, self.facts.position_planes)
        if text is None and outer is None and isinstance(positions, torch.Tensor):
            return planes.text_positions(positions)
        return text

    def _trace(
        self,
        module: torch.nn.Module,
        given: dict[str, Any],
        seen: tuple[Any, ...],
        rows: int,
        length: int,
        finished: bool,
        outer: Context | None,
    ) -> TracedSegments | None:
        """The documents while a graph is traced; checks that need values run with the graph."""
        facts = self.facts
        positions, mask, cu_q, cu_k = seen
        segments: TracedSegments | None
        if cu_q is not None or cu_k is not None:
            segments = traced.from_cu_seqlens(cu_q if cu_q is not None else cu_k, rows, length, "cu_seq_lens_q")
            if cu_q is not None and cu_k is not None and cu_q is not cu_k:
                torch._assert_async((cu_q == cu_k).all(), "axattn: cu_seq_lens_q and cu_seq_lens_k differ")
        else:
            positions = self._text_positions(positions, rows, length, outer)
            if finished:
                return None
            inside = inputs.mask_of_tokens(mask, length, given.get("past_key_values"))
            if positions is not None and facts.first_position and not _decodes(given):
                inputs.require_counted_from(facts.first_position, module, positions, inside)
            segments = traced.from_positions(positions, inside, rows, length)
        if segments is None:
            return None
        cache = given.get("past_key_values")
        length_so_far = 0 if cache is None else cache.get_seq_length()
        filled = isinstance(length_so_far, torch.Tensor) or length_so_far > 0
        leaks = facts.native is not None and guard.may_leak(facts.native, module, given, facts.standing, facts.overlays)
        leaks = leaks or bool(inputs.switched(facts, module))
        counted = facts.counted is not None and length > facts.counted
        if facts.encoder_decoder or filled or leaks or counted or facts.mixers or facts.unfit:
            segments.require_single("packed rows would leak here; run without torch.compile to see why")
        return segments


def _caller() -> FrameType | None:
    """The frame that calls the hook in which this is called: it runs the model's forward next."""
    if torch.compiler.is_compiling():
        return None
    here = inspect.currentframe()
    return here.f_back.f_back if here is not None and here.f_back is not None else None


def _speaks_of(context: Context, lengths: Any) -> bool:
    """Whether these are the lengths that the model of a context was given for its own tokens."""
    return lengths is not None and len(context.seen) > 2 and context.seen[2] is lengths


def _decodes(given: dict[str, Any]) -> bool:
    """Whether the forward may be a step of ``generate``, which counts positions from 0 in any model."""
    return given.get("past_key_values") is not None or bool(given.get("use_cache"))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    some = False
    for x, y in zip(a, b, strict=True):
        if x is not y:
            return False
        some = some or x is not None
    return some
