"""`Context`: what the input hook of a model found for the forward that is running, in a slot of the thread."""

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
from axattn.hf.graph_handles import new_handle
from axattn.hf.torch_internals import is_executing


class BoundaryInputs(NamedTuple):
    """The inputs of a forward that say which tokens belong together, None where they are not given."""

    positions: Any = None
    mask: Any = None
    cu_q: Any = None
    cu_k: Any = None
    index: Any = None

    @property
    def nothing(self) -> bool:
        """None of them is given."""
        return self.positions is self.mask is self.cu_q is self.cu_k is self.index is None

    def same(self, other: BoundaryInputs) -> bool:
        """Whether both are the same objects, and there is one."""
        for x, y in zip(self, other, strict=True):
            if x is not y:
                return False
        return not self.nothing


@dataclass(slots=True, eq=False)
class Context:
    """What the input hook found for the forward that is running.

    Attributes:
        segments: the documents, None when every row is one document.
        shape: (B, S) of the tokens, None when the model takes no tokens (a vision tower).
        weights: the attention weights are asked for (``output_attentions``).
        bounds: the objects it was computed from, to reuse it in inner models that get the same ones.
        zero_one_mask: the mask of 0 and 1 that the model is given in the place of one, in `bounds`, that numbers
            documents.
        hook: whose forward is running.
        outer: the context to go back to.
        shard: the forward runs on this rank's share of its rows.
        crosses: the model also attends to another sequence (``encoder_hidden_states``).
        reads_padding: what padding attends to matters: a head of the model reads it.
        unpadded: where the tokens of an unpadded row stand in its batch.
        caches: those that packed rows are given, which they fill.
        recheck: the model, where code that is not known runs between its input hook and its forward
            (`axattn.documents.late_inputs`).
        caller: the frame in which the forward runs, None where nobody can tell (compiled frames).
        handle: leads a graph to the documents that were read before it.
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
        """The documents for who may be in a graph that the input hook is not in (``model.forward =
        torch.compile(...)``): there a tensor, or the graph would be for these documents alone."""
        if (
            not torch.compiler.is_compiling()
            or self.handle is None
            or self.shape is None
            or not isinstance(self.segments, Segments)
        ):
            return self.segments
        rows, length = self.shape
        return TracedSegments(document_ids_op(self.handle, rows, length, self.segments.device), rows, length)

    @property
    def running(self) -> bool:
        """Whether the forward still runs. An interrupt (Ctrl-C in a notebook) ends one without its hooks."""
        return self.caller is None or is_executing(self.caller)


class _Slot:
    """What runs in a thread.

    Attributes:
        context: of the innermost model that is running.
        entered: the changes around whole models that are running (`axattn.patches.forward_wrapper.OncePerCall`).
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
    """The slot of each thread: an object that is never exchanged. What a frame compiled by torch sets on a thread-local
    itself is lost when the frame ends (torch 2.13); context variables can't be traced at all."""

    def __init__(self) -> None:
        self.slot = _Slot()


_threads = _Threads()


def slot() -> _Slot:
    """The slot of this thread."""
    return _threads.slot


def current() -> Context | None:
    """The context of the innermost model that is running, None outside of any model with an input hook."""
    here = _threads.slot
    if not torch.compiler.is_dynamo_compiling():  # `torch.export` runs the frames themselves, and ends some by an error
        while here.context is not None and not here.context.running:
            here.context = here.context.outer
    return here.context


@contextlib.contextmanager
def reading(context: Context) -> Iterator[None]:
    """Masks that are made in this block are made from `context`, unless an input hook in it says otherwise."""
    here = slot()
    before, here.context = here.context, context
    try:
        yield
    finally:
        here.context = before


@contextlib.contextmanager
def assume(*, shard: SequenceShard | None = None, documents: Segments | None = None) -> Iterator[None]:
    """Input hooks that run in this block take what is given in place of what their inputs say.

    Args:
        shard: of documents and padding, on a rank that holds a part of its rows.
        documents: of an unpadded row.
    """
    here = slot()
    before = here.shard, here.known_documents
    here.shard, here.known_documents = shard, documents
    try:
        yield
    finally:
        here.shard, here.known_documents = before
