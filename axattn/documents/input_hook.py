"""The input hook of a model: a forward pre-hook that reads positions, cumulative lengths and masks once per forward.

Every `PreTrainedModel` inside a model has one `InputHook`. It checks the inputs, finds the documents (`Segments`) and
keeps them in the thread's slot (`axattn.documents.forward_context`) while the forward runs, for the mask function. On
native names the same input hook is a guard: it refuses packed input whose documents would leak in Transformers.
"""

from __future__ import annotations

import functools
import sys
from types import FrameType
from typing import Any

import torch

from axattn.documents import mrope, native_flash_guard, native_guard
from axattn.documents.boundaries import Segments, holds_document_ids
from axattn.documents.forward_context import BoundaryInputs, Context, current, slot
from axattn.documents.inputs import switched_to_native
from axattn.documents.late_inputs import recheck_inputs
from axattn.documents.model_state import SDPA, ModelState
from axattn.documents.padding_reads import padding_is_read
from axattn.documents.read_inputs import boundary_inputs, read, zero_one_mask
from axattn.documents.traced import TracedSegments
from axattn.documents.wrapper_positions import require_positions_passed_on
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.hf.caches import caches_in, is_packed, mark_packed
from axattn.hf.forward_inputs import INPUTS, LENGTHS, caches_of, is_paged_step, token_shape, tokens_alone
from axattn.hf.model_internals import wants_weights
from axattn.hf.source_inspection import calls_interface
from axattn.hf.torch_internals import is_tracing
from axattn.traits import picked_tokens
from axattn.traits.model_traits import ModelTraits
from axattn.traits.position_ids import count_positions

_NOTHING = BoundaryInputs()


class InputHook:
    """The forward pre-hook and forward hook of one `PreTrainedModel`. Picklable and copyable with its model.

    Args:
        traits: the traits of the model.
    """

    def __init__(self, traits: ModelTraits) -> None:
        self.traits = traits
        self.state = ModelState(traits)
        self._watching: list[Any] = []

    def remove_watchers(self) -> None:
        """Remove the hooks that `_watch` added."""
        while self._watching:
            self._watching.pop().remove()

    def pre_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook (``with_kwargs=True``). Adds to packed rows what is missing: on a flash name the lengths of
        the documents, which Transformers' flash path reads at any batch size, and positions that restart in each
        document. Replaces a mask of document ids by a 0/1 mask."""
        paged = "write_index" in kwargs and is_paged_step(kwargs)  # most forwards need no call for this
        if paged and (self.traits.native is not None or switched_to_native(self.traits, module)):
            return None
        state, compiling = self.state, torch.compiler.is_compiling()
        if compiling or not state.unchanged():
            state.require(module, self.pre_forward)
            if not compiling and state.inputs_may_change and self.traits.native is not None and not self._watching:
                self._watch(module)
        if not compiling and state.tokens_suffice and not args and self._enter(module, kwargs):
            return None
        given = {**dict(zip(self.traits.parameters, args, strict=False)), **kwargs} if args else kwargs
        here, outer = slot(), current()
        recheck = module if not compiling and state.inputs_may_change else None
        weights = self._require_allowed(module, given)
        bounds = boundary_inputs(given, outer)
        unchanged: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        if outer is not None and _has_lengths(outer, bounds.cu_q) and token_shape(given) is None:
            # the lengths of the text, which Transformers also passes to a vision tower (5.17)
            kwargs = {name: value for name, value in kwargs.items() if name not in LENGTHS}
            bounds, unchanged = bounds._replace(cu_q=None, cu_k=None), (args, kwargs)
        if here.shard is not None or here.known_documents is not None:
            segments, shape = self._known(module, given, here.known_documents)
            here.context = Context(
                segments, shape, weights, bounds, self, outer, here.shard, caller=_caller(), recheck=recheck
            )
            return unchanged
        if (
            outer is not None
            and recheck is None
            and not weights
            and outer.segments is None
            and outer.hook is not self
            and bounds.nothing
            and given.keys() <= INPUTS.keys()
            and not any(map(is_packed, caches_of(given)))
            and given.get("encoder_hidden_states") is None
        ):
            return unchanged  # an inner model with nothing to read: the context of the outer input hook stays
        reads_padding = outer is not None and outer.reads_padding
        if self.traits.reads and not reads_padding:
            reads_padding = padding_is_read(self.traits, module, given)
        if self.traits.picks and not reads_padding:
            reads_padding = picked_tokens.padding_is_read(self.traits.picks, self.traits.native, module, given)
        masked = outer.zero_one_mask if outer is not None and bounds.mask is outer.bounds.mask else None
        if outer is not None and bounds.same(outer.bounds):
            segments, shape = outer.documents, outer.shape
        else:
            segments, shape, has_document_ids = read(self.traits, module, given, bounds, outer)
            if has_document_ids and masked is None:
                masked = zero_one_mask(bounds.mask)
        if masked is not None and masked is not given.get("attention_mask"):
            args, kwargs = unchanged = self._masked(args, kwargs, masked)
        if segments is not None:
            completed, bounds = self._complete(module, args, kwargs, given, bounds, segments)
            unchanged = completed or unchanged
        here.context = Context(
            segments,
            shape,
            weights,
            bounds,
            self,
            outer,
            crosses=given.get("encoder_hidden_states") is not None,
            reads_padding=reads_padding,
            caller=_caller(),
            zero_one_mask=masked,
            caches=tuple(caches_of(given)) if segments is not None else (),
            recheck=recheck,
        )
        return unchanged

    def check_delivery(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an attention module on a flash name: checks that it gets the documents of its rows."""
        if self.traits.native is None or is_paged_step(kwargs):
            return
        native_flash_guard.require_position_per_token(self.traits.native, module, args, kwargs)
        context = current()
        if context is not None and isinstance(context.segments, Segments):
            native_flash_guard.require_reached(self.traits.native, module, kwargs, context.segments)

    def post_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook (``always_call=True``): also runs when the forward raised."""
        here = slot()
        context = here.context
        if context is None or context.hook is not self:  # `pre_forward` raised: nothing was set
            return
        here.context = context.outer
        if context.segments is not None:
            caches = [*context.caches, *caches_in(output)]
            if caches:
                length = context.segments.first_document_length
                for cache in caches:
                    mark_packed(cache, length)

    def _enter(self, module: torch.nn.Module, given: dict[str, Any]) -> bool:
        """Set the context of a forward that is given only tokens and padding, where every row is one document, and
        return True. False, and nothing is set, for all others."""
        here = slot()
        if here.context is not None or here.shard is not None or here.known_documents is not None:
            return False
        shape = tokens_alone(given)
        if shape is None:
            return False
        bounds, mask = _NOTHING, given.get("attention_mask")
        if mask is not None:
            if is_tracing() or (shape[1] > 1 and holds_document_ids(mask)):
                return False
            bounds = BoundaryInputs(mask=mask)
        if shape[1] > 1:
            require_positions_passed_on(module, *shape)
        here.context = Context(None, shape, False, bounds, self, None, caller=sys._getframe(2))
        return True

    def _watch(self, module: torch.nn.Module) -> None:
        """On native names no axattn code runs inside the forward: add pre-hooks to the model's children and its first
        attention module, the first of which runs before a finished mask replaces the given one (BERT)."""
        attention = next((inner for inner in module.modules() if calls_interface(type(inner))), None)
        for inner in dict.fromkeys((*module.children(), attention)):
            if inner is not None:
                # before the input hook of an inner model, which sets its own context
                self._watching.append(inner.register_forward_pre_hook(_recheck, prepend=True))

    def _require_allowed(self, module: torch.nn.Module, given: dict[str, Any]) -> bool:
        """Raise for what this model can't do on its kernel with any tokens. Returns whether attention weights are
        requested."""
        traits = self.traits
        if module.training and getattr(module, "gradient_checkpointing", False):
            native_guard.require_prefix_survives(module, given)
        if traits.shares_keys:
            native_guard.require_gradients_of_shared_keys(module)
        if torch.nn.functional.scaled_dot_product_attention is not SDPA and traits.native is None:
            native_guard.require_no_context_parallel(module)
        if traits.on_flash and traits.native is not None:
            native_flash_guard.require_deterministic(traits.native, traits.nondeterministic, module)
        weights = given.get("output_attentions")
        if weights is None:
            weights = wants_weights(module.config)
        if weights and traits.native not in (None, "eager"):
            raise UnsupportedAttentionError(
                f"{traits.native} can't serve {type(module).__name__}",
                [Reason("weights", "output_attentions=True (its kernel never forms the attention weights)")],
                'Use attn_implementation="auto" or "eager".',
            )
        return bool(weights)

    def _masked(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs with `mask` as their 2-D mask."""
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": mask}
        at = self.traits.parameters.index("attention_mask")
        return (*args[:at], mask, *args[at + 1 :]), kwargs

    def _known(
        self, module: torch.nn.Module, given: dict[str, Any], known: Segments | None
    ) -> tuple[Segments | TracedSegments | None, tuple[int, int] | None]:
        """The documents that the caller already knows (`axattn.documents.forward_context.assume`)."""
        shape = token_shape(given)
        if known is not None and shape != (known.rows, known.length):
            # read from positions alone, two rows could be one document
            text = f"{type(module).__name__} has {shape} tokens where the unpadded row has {(known.rows, known.length)}"
            raise InvalidInputError(text, advice="Leave unpad out.")
        return (known if known is not None and known.packed else None), shape

    def _complete(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[str, Any],
        bounds: BoundaryInputs,
        segments: Segments | TracedSegments,
    ) -> tuple[tuple[tuple[Any, ...], dict[str, Any]] | None, BoundaryInputs]:
        """The inputs with what packed rows lack, None when they lack nothing; and their new `BoundaryInputs`."""
        traits = self.traits
        flattened = bool(traits.mrope_planes) and mrope.lacks_mrope_planes(given)
        added: dict[str, Any] = {}
        lengths = None
        if (flattened or traits.on_flash) and traits.takes_lengths and isinstance(segments, Segments):
            lengths = added = native_flash_guard.lengths_of(segments)
            bounds = bounds._replace(cu_q=lengths["cu_seq_lens_q"], cu_k=lengths["cu_seq_lens_k"])
        if flattened:
            if isinstance(segments, TracedSegments):
                segments.require_single("packed rows with images need position_ids of 3 or 4 planes in a graph")
            else:
                args, added = mrope.without_positions(module, traits.parameters, args, lengths)
                bounds = bounds._replace(positions=None)
        elif bounds.positions is None and not traits.mrope_planes and "position_ids" in traits.parameters[len(args) :]:
            added["position_ids"] = self._positions(segments, given, bounds)
            bounds = bounds._replace(positions=added["position_ids"])
        return ((args, {**kwargs, **added}) if added else None), bounds

    def _positions(
        self, segments: Segments | TracedSegments, given: dict[str, Any], bounds: BoundaryInputs
    ) -> torch.Tensor:
        """int64 ``[B, S]`` that restart in each document. In a graph that may get rows of one document: the model's own
        count for these."""
        traits, documents = self.traits, segments.document_ids
        mask = bounds.mask
        if not isinstance(mask, torch.Tensor) or mask.shape != documents.shape:
            mask = torch.ones_like(documents)
        count = functools.partial(
            count_positions, traits.first_position, traits.counts_mask, given.get("input_ids"), mask
        )
        restarting: torch.Tensor = count(documents)
        if isinstance(segments, Segments) or bounds.cu_q is not None or bounds.cu_k is not None:
            return restarting
        return torch.where((documents[:, -1] > 0).any(), restarting, count())


def _recheck(module: torch.nn.Module, args: Any) -> None:
    """Forward pre-hook of an attention module (see `InputHook._watch`)."""
    context = None if torch.compiler.is_compiling() else current()
    if context is not None and context.recheck is not None:
        recheck_inputs(context)


def _caller() -> FrameType | None:
    """The frame that calls the running hook: it runs the model's forward next."""
    if torch.compiler.is_dynamo_compiling():
        return None
    return sys._getframe(2)


def _has_lengths(context: Context, lengths: Any) -> bool:
    """Whether `lengths` are the cumulative lengths that the model of `context` was given for its own tokens."""
    return lengths is not None and context.bounds.cu_q is lengths
