"""`LazyMask`: a compact description of a mask, made dense only on access.

`axattn.masks.mask_interface` builds these from Transformers' mask arguments; backends read `layout()` or `dense()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from axattn.documents.boundaries import Segments
from axattn.documents.traced import TracedSegments
from axattn.hf.graph_handles import entry_of, new_handle
from axattn.hf.mask_functions import Pattern
from axattn.hf.tensor_snapshots import READS_ON_HOST, snapshot
from axattn.hf.torch_internals import in_traced_subgraph, is_tracing, needs_torch_operators
from axattn.masks.tensor_like import TensorLike
from axattn.masks.varlen_layout import Layout, build_layout


class LazyMask(TensorLike):
    """A bool mask ``[B, 1, S, T]`` (True: attend) that is made dense only on access.

    Transformers passes it through a model in place of a mask tensor. Indexing, arithmetic, ``.to``, torch functions and
    unknown attributes materialise it; the result equals Transformers' own ``sdpa_mask`` with documents separated.

    Attributes:
        pattern: the rule of a recognised mask function, or None (then only `dense` can be used).
        segments: documents of the rows, or None.
        padding: bool ``[B, T]`` (True: real key), or None.
        guarded: an input hook read the documents; otherwise they are read from the attention call's keywords.
        crosses: the queries may be other tokens than the keys (cross-attention), so padding keys are not padding
            queries.
        weights: attention weights are requested.
        dense_in_graphs: graphs use this mask dense, because they must work for every length of the cache.
        ready: the dense mask if it was built in advance for a graph.
    """

    __slots__ = (
        "_as_flag",
        "_dense",
        "_layout",
        "_materialise",
        "_moved",
        "_offset",
        "_padding",
        "_padding_checked",
        "_padding_on_host",
        "_signature",
        "crosses",
        "dense_in_graphs",
        "device",
        "guarded",
        "handle",
        "kv_offset",
        "notes",
        "pattern",
        "ready",
        "segments",
        "shape",
        "weights",
    )

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        pattern: Pattern | None,
        segments: Segments | TracedSegments | None,
        padding: torch.Tensor | None,
        materialise: Callable[[], torch.Tensor],
        q_offset: int | torch.Tensor = 0,
        kv_offset: int = 0,
        device: torch.device,
        guarded: bool = False,
        weights: bool = False,
        crosses: bool = False,
        dense_in_graphs: bool = False,
        ready: torch.Tensor | None = None,
        padding_on_host: torch.Tensor | None = None,
    ) -> None:
        if is_tracing() and not needs_torch_operators() and not dense_in_graphs:
            # operators of the graph read these on the host, once for all layers
            padding = None if padding is None else snapshot(padding)
            segments = segments.snapshot() if isinstance(segments, TracedSegments) else segments
        self.shape = torch.Size(shape)
        self.pattern = pattern
        self.segments = segments
        self._offset = q_offset
        self.dense_in_graphs = dense_in_graphs
        self.ready = ready
        self.kv_offset = kv_offset
        self.device = device
        self.guarded = guarded
        self.weights = weights
        self.crosses = crosses
        # results that layers share, by candidates, shapes and dtypes (`axattn.attention.short_path`)
        self.notes: dict[tuple[Any, ...], Any] = {}
        self._padding = padding
        self._padding_checked = padding is None or padding_on_host is not None  # the caller checked it
        self._padding_on_host = padding_on_host
        self._materialise = materialise
        self._dense: torch.Tensor | None = None
        self._layout: Layout | bool | None = False
        self._signature: tuple[Any, ...] | None = None
        self._as_flag: str | None = "unread"
        self._moved: dict[torch.device, LazyMask] = {}
        self.handle = None if is_tracing() else self._new_handle()

    @property
    def padding(self) -> torch.Tensor | None:
        """Bool ``[B, T]``, None when no key is padding. Reads the mask's values once; never while tracing."""
        if is_tracing():
            return self._padding
        if not self._padding_checked:
            self._padding_checked = True
            found = self.padding_on_host
            if found is not None and bool(found.all()):
                self._padding = self._padding_on_host = None
        return self._padding

    @property
    def padding_on_host(self) -> torch.Tensor | None:
        """`padding` on the CPU: the one transfer to the host, used for every decision on its values."""
        if self._padding_on_host is None and self._padding is not None:
            self._padding_on_host = self._padding.cpu()
        return self._padding_on_host

    @property
    def q_offset(self) -> int:
        """Position of the first query. With a static cache it is a tensor, read on the host once; not in graphs."""
        if not isinstance(self._offset, int):
            self._offset = int(self._offset)
        return self._offset

    @property
    def materialised(self) -> bool:
        """Whether the dense tensor has been built (and is held)."""
        return self._dense is not None

    def dense(self) -> torch.Tensor:
        """The bool tensor ``[B, 1, S, T]``, built on the first call."""
        if is_tracing() and not needs_torch_operators():
            return self._traced_dense()
        if self._dense is None:
            self._dense = self._materialise() if self.ready is None else self.ready
        return self._dense

    def _traced_dense(self) -> torch.Tensor:
        if self.ready is not None:
            return self.ready
        if self.handle is not None:
            rows, _, queries, keys = self.shape
            found: torch.Tensor = dense_mask_op(self.handle, rows, queries, keys, self.device)
            return found
        if self._dense is not None:
            return self._dense
        dense = self._materialise()
        if not in_traced_subgraph():  # not in the body of a checkpoint
            self._dense = dense
        return dense

    def _new_handle(self) -> torch.Tensor:
        """A tensor that identifies a copy of this mask (`of_handle`), as input of a compiled layer."""
        fields = ("shape", "pattern", "segments", "kv_offset", "device", "guarded", "weights", "crosses", "ready")
        made = {name: getattr(self, name) for name in fields}
        rest = {"q_offset": self._offset, "padding": self._padding, "materialise": self._materialise}
        return new_handle({**made, **rest})

    @property
    def whole(self) -> bool:
        """Whether the rule is known and queries and keys are the same tokens (no cache), so kernels can be traced."""
        _, _, q_length, kv_length = self.shape
        return (
            self.pattern is not None
            and not (self.dense_in_graphs and torch.compiler.is_compiling())
            and self.q_offset == self.kv_offset
            and q_length == kv_length
            and not (self.crosses and self._padding is not None)
        )

    def _read_traced_segments(self) -> None:
        """Read the documents of a mask that was traced, after a graph break."""
        if isinstance(self.segments, TracedSegments):
            self.segments = self.segments.read()

    def layout(self) -> Layout | None:
        """The mask as spans, None if it has no such form. Computed once for all layers of a forward."""
        if isinstance(self._layout, bool):
            self._read_traced_segments()
            self._layout = build_layout(self)
        return self._layout

    @property
    def as_flag(self) -> str | None:
        """``"causal"`` or ``"full"`` if a kernel's ``is_causal`` describes the whole mask (each row is one document
        without padding), else None."""
        if is_tracing():
            return self._read_flag()
        if self._as_flag == "unread":
            self._read_traced_segments()
            self._as_flag = self._read_flag()
        return self._as_flag

    def _read_flag(self) -> str | None:
        pattern = self.pattern
        if pattern is None or self.segments is not None or pattern.chunk is not None or self.weights:
            return None
        if self.dense_in_graphs and torch.compiler.is_compiling():
            return None
        _, _, q_length, kv_length = self.shape
        if pattern.window is not None and pattern.window < kv_length:
            return None
        square = self.q_offset == self.kv_offset and q_length == kv_length
        last = q_length == 1 and self.q_offset - self.kv_offset + 1 == kv_length
        if (pattern.causal and not square and not last) or self.padding is not None:
            return None
        return "causal" if pattern.causal and not last else "full"

    def signature(self) -> tuple[Any, ...]:
        """The properties that decide which kernels can serve this mask: hashable, equal for masks of one kind."""
        if is_tracing():  # not cached on the mask: the next layer's graph would differ
            return self._read_signature(self.whole or self.dense_in_graphs)
        if self._signature is None:
            self._signature = self._read_signature(bool(self.as_flag) or self.layout() is not None)
        return self._signature

    def _read_signature(self, spans: bool) -> tuple[Any, ...]:
        pattern = self.pattern
        return (
            pattern is None or pattern.causal,
            None if pattern is None else pattern.window,
            None if pattern is None else pattern.chunk,
            not spans,
            self.padding is not None,
            self.segments is not None,
            isinstance(self.segments, Segments) and self.segments.stems is not None,
            pattern is None,
        )

    def on(self, device: torch.device) -> LazyMask:
        """The same mask for layers on another device (accelerate's ``device_map``), one object per device."""
        if is_tracing():
            return self._on(device)
        if device not in self._moved:
            self._moved[device] = self._on(device)
        return self._moved[device]

    def _on(self, device: torch.device) -> LazyMask:
        materialise, padding = self._materialise, self.padding  # not `self`: avoids a cycle, see `of_handle`
        there = LazyMask(
            shape=tuple(self.shape),
            pattern=self.pattern,
            segments=None if self.segments is None else self.segments.to(device),
            padding=None if padding is None else padding.to(device),
            materialise=lambda: materialise().to(device),
            q_offset=self._offset,
            kv_offset=self.kv_offset,
            device=device,
            guarded=self.guarded,
            weights=self.weights,
            crosses=self.crosses,
            dense_in_graphs=self.dense_in_graphs,
            ready=None if self.ready is None else self.ready.to(device),
            padding_on_host=self._padding_on_host,
        )
        there._padding_checked = self._padding_checked
        return there

    def with_segments(self, segments: Segments | TracedSegments) -> LazyMask:
        """The same mask with documents separated (for models without an input hook)."""
        mask, ids = self, segments.document_ids

        def materialise() -> torch.Tensor:
            return mask.dense() & (ids[:, None, :, None] == ids[:, None, None, :])

        return LazyMask(
            shape=tuple(self.shape),
            pattern=self.pattern,
            segments=segments,
            padding=self._padding,
            padding_on_host=self._padding_on_host,
            materialise=materialise,
            q_offset=self._offset,
            kv_offset=self.kv_offset,
            device=self.device,
            guarded=True,
            weights=self.weights,
            dense_in_graphs=self.dense_in_graphs,
        )

    def __getitem__(self, index: Any) -> torch.Tensor | LazyMask:
        """Itself for slices that cover everything, a `LazyMask` for the last queries, else a part of the dense mask.

        Models slice masks needlessly (``mask[:, :, :, :kv_length]``); Gemma 4's layers with shared keys select the
        queries whose logits are kept.
        """
        if isinstance(index, tuple) and len(index) == 4 and all(isinstance(part, slice) for part in index):
            ranges = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
            whole = [found == (0, size, 1) for found, size in zip(ranges, self.shape, strict=True)]
            if all(whole):
                return self
            start, stop, step = ranges[2]
            if whole[0] and whole[1] and whole[3] and 0 < start < stop == self.shape[2] and step == 1:
                return self._last_queries(start)
        return self.dense()[index]

    def _last_queries(self, start: int) -> torch.Tensor | LazyMask:
        if self.segments is not None:
            return self.dense()[:, :, start:]
        rows, _, q_length, kv_length = self.shape
        return LazyMask(
            shape=(rows, 1, q_length - start, kv_length),
            pattern=self.pattern,
            segments=None,
            padding=self._padding,
            padding_on_host=self._padding_on_host,
            materialise=lambda: self.dense()[:, :, start:],
            q_offset=self._offset + start,
            kv_offset=self.kv_offset,
            device=self.device,
            guarded=self.guarded,
            weights=self.weights,
            dense_in_graphs=self.dense_in_graphs,
            ready=None if self.ready is None else self.ready[:, :, start:],
        )

    def __repr__(self) -> str:
        kind = "dense" if self.pattern is None else ("causal" if self.pattern.causal else "full")
        return f"LazyMask(shape={tuple(self.shape)}, {kind}, documents={self.segments and self.segments.documents})"


def of_handle(handle: torch.Tensor) -> LazyMask:
    """The mask behind a handle, the same object for all layers with the same handle."""
    entry = entry_of(handle)
    if isinstance(entry.value, dict):
        found = LazyMask(**entry.value)
        found.handle = None  # no back reference: a cycle would keep the mask of every batch until the next collection
        entry.value = found
    mask: LazyMask = entry.value
    return mask


@torch.library.custom_op("axattn::dense_mask", mutates_args=(), tags=READS_ON_HOST)
def dense_mask_op(handle: torch.Tensor, rows: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool ``[B, 1, S, T]``: the dense mask behind a handle, for code inside a compiled layer."""
    return of_handle(handle).dense().clone()


@dense_mask_op.register_fake
def _(handle: torch.Tensor, rows: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    return handle.new_empty(rows, 1, queries, keys, dtype=torch.bool, device=device)
