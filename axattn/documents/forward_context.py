"""`Context`: what the input hook of a model found for the running forward, kept in a slot per thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch

from axattn.documents.boundaries import Segments
from axattn.documents.sequence_shard import SequenceShard
from axattn.documents.traced import TracedSegments, document_ids_op
from axattn.documents.unpadded_batch import UnpaddedBatch
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.graph_handles import new_handle
from axattn.hf.torch_internals import is_executing


class BoundaryInputs(NamedTuple):
    """The inputs of a forward that describe document boundaries; None for inputs that are not given."""

    positions: Any = None
    mask: Any = None
    cu_q: Any = None
    cu_k: Any = None
    index: Any = None

    @property
    def nothing(self) -> bool:
        """Whether none of them is given."""
        return self.positions is self.mask is self.cu_q is self.cu_k is self.index is None

    def same(self, other: BoundaryInputs) -> bool:
        """Whether both hold the same objects, at least one of them not None."""
        for x, y in zip(self, other, strict=True):
            if x is not y:
                return False
        return not self.nothing


@dataclass(slots=True, eq=False)
class Context:
    """What the input hook found for the running forward.

    Attributes:
        segments: the documents, None when every row is one document.
        shape: (B, S) of the tokens, None when the model takes no tokens (a vision tower).
        weights: attention weights are requested (``output_attentions``).
        bounds: the inputs it was computed from; an inner model with the same inputs reuses `segments`.
        zero_one_mask: the 0/1 mask that the model gets in place of a mask with document ids (kept in `bounds`).
        hook: the input hook of the model that is running.
        outer: the context to restore afterwards.
        shard: the shard of the rows that this rank runs.
        crosses: the model also attends to another sequence (``encoder_hidden_states``).
        reads_padding: outputs are read from padding, so it needs the attention that eager computes.
        unpadded: maps the tokens of an unpadded row to its padded batch.
        caches: the caches that packed rows fill.
        recheck: the model, if unknown code runs between its input hook and its forward
            (`axattn.documents.late_inputs`).
        caller: the frame in which the forward runs, None if unknown (compiled frames).
        handle: gives a graph the documents that were read before it.
    """

    segments: Segments | TracedSegments | None
    shape: tuple[int, int] | None
    weights: bool
    bounds: BoundaryInputs
    hook: object
    outer: Context | None
    shard: SequenceShard | None = None
    crosses: bool = False
    reads_padding: bool = False
    caller: FrameType | None = None
    zero_one_mask: torch.Tensor | None = None
    unpadded: UnpaddedBatch | None = None
    caches: tuple[Any, ...] = ()
    recheck: torch.nn.Module | None = None
    handle: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.segments, Segments) and not torch.compiler.is_compiling():
            self.handle = new_handle(self.segments)

    @property
    def documents(self) -> Segments | TracedSegments | None:
        """The documents for code that may run in a graph without the input hook (``model.forward =
        torch.compile(...)``): a tensor there, so that the graph is not specialised on these documents."""
        if (
            not torch.compiler.is_compiling()
            or self.handle is None
            or self.shape is None
            or not isinstance(self.segments, Segments)
        ):
            return self.segments
        if self.segments.stems is not None:
            raise UnsupportedAttentionError(
                "share_prefixes=True can't serve a compiled model",
                [Reason("stems", "a graph of the whole model does not get the documents' stems")],
                "Compile its layers (layer.compile()), not the model.",
            )
        rows, length = self.shape
        return TracedSegments(document_ids_op(self.handle, rows, length, self.segments.device), rows, length)


class _Slot:
    """The state of one thread.

    Attributes:
        context: of the innermost running model.
        entered: the running wrappers of whole models (`axattn.patches.forward_wrapper.OncePerCall`).
        shard: see `assume`.
        known_documents: the ``documents`` of `assume`.
    """

    __slots__ = ("context", "entered", "known_documents", "shard")

    def __init__(self) -> None:
        self.context: Context | None = None
        self.entered: tuple[object, ...] = ()
        self.shard: SequenceShard | None = None
        self.known_documents: Segments | None = None


class _Threads(threading.local):
    """The slot of each thread, an object that is never replaced: what a compiled frame sets on a thread-local itself is
    lost when the frame ends (torch 2.13), and context variables can't be traced."""

    def __init__(self) -> None:
        self.slot = _Slot()


_threads = _Threads()


def slot() -> _Slot:
    """The slot of this thread."""
    return _threads.slot


def current() -> Context | None:
    """The context of the innermost running model, None outside any model with an input hook."""
    here = _threads.slot
    if not torch.compiler.is_dynamo_compiling():  # `torch.export` runs the frames itself, and ends some with an error
        while here.context is not None and not (here.context.caller is None or is_executing(here.context.caller)):
            here.context = here.context.outer  # an interrupt (Ctrl-C in a notebook) skips the hooks that end a forward
    return here.context


@contextlib.contextmanager
def reading(context: Context) -> Iterator[None]:
    """Masks made in this block use `context`, unless an input hook inside sets another one."""
    here = slot()
    before, here.context = here.context, context
    try:
        yield
    finally:
        here.context = before


@contextlib.contextmanager
def assume(*, shard: SequenceShard | None = None, documents: Segments | None = None) -> Iterator[None]:
    """Input hooks that run in this block use these arguments instead of reading their inputs.

    Args:
        shard: this rank's shard of the rows, with their documents and padding.
        documents: the documents of an unpadded row.
    """
    here = slot()
    before = here.shard, here.known_documents
    here.shard, here.known_documents = shard, documents
    try:
        yield
    finally:
        here.shard, here.known_documents = before
