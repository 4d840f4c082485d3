"""`Layout`: a mask as spans of queries and keys for varlen kernels, and how it is built from a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch

from axattn.documents.boundaries import Ranges, Segments, cut, total
from axattn.hf.transfers import captures_graph
from axattn.masks.dense_rule import dense_rule

if TYPE_CHECKING:
    from axattn.hf.mask_functions import Pattern
    from axattn.masks.lazy_mask import LazyMask

Made = TypeVar("Made")


class Span(NamedTuple):
    """Queries ``[q0, q1)`` of rows ``[row0, row1)`` attend to keys ``[k0, k1)``, aligned bottom-right if causal."""

    row0: int
    row1: int
    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True)
class Layout:
    """A mask as spans, for varlen kernels.

    Attributes:
        spans: disjoint in their queries; a query in no span is padding and its output is zero.
        causal: within a span.
        window: visible keys to the left, including the query's own (and to the right, if not causal); None for all.
        rows: B.
        q_length: S.
        kv_length: T.
        stems: for each span, the ranges of keys that its queries attend to before ``[k0, k1)``; empty if no span has
            any. Spans of such a layout are of one row each, and if causal aligned bottom-right along all their keys; if
            not, they have no window, and their other keys are in any order.
        memo: values that backends derive from the layout (`kept`).
    """

    spans: tuple[Span, ...]
    causal: bool
    window: int | None
    rows: int
    q_length: int
    kv_length: int
    stems: tuple[Ranges, ...] = ()
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def whole_rows(self) -> bool:
        """Whether each row is one document from end to end."""
        return self.spans == ((0, self.rows, 0, self.q_length, 0, self.kv_length),)

    def dense(self, device: torch.device) -> torch.Tensor:
        """The dense mask: bool ``[B, 1, S, T]``, True: attend."""
        allowed = torch.zeros(self.rows, 1, self.q_length, self.kv_length, dtype=torch.bool, device=device)
        for (row0, row1, q0, q1, k0, k1), stem in self.with_stems:
            if stem:
                keys = torch.cat([torch.arange(a, b, device=device) for a, b in (*stem, (k0, k1))])
                rule = dense_rule(
                    q1 - q0,
                    len(keys),
                    causal=self.causal,
                    window=self.window,
                    offset=len(keys) - (q1 - q0),
                    device=device,
                )
                allowed[row0, 0, q0:q1, keys] = rule[0, 0]
                continue
            queries, width = q1 - q0, k1 - k0  # aligned bottom-right
            allowed[row0:row1, :, q0:q1, k0:k1] = dense_rule(
                queries, width, causal=self.causal, window=self.window, offset=width - queries, device=device
            )
        return allowed

    @property
    def with_stems(self) -> list[tuple[Span, Ranges]]:
        """Each span with its stem."""
        return list(zip(self.spans, self.stems or [()] * len(self.spans), strict=True))

    def kept(self, name: str, make: Callable[[], Made]) -> Made:
        """The result of `make`, computed once for all layers.

        `make` runs outside ``inference_mode``: the layout of a shared causal mask outlives a forward, and a later
        training step can't save inference tensors for backward. Not kept while a CUDA graph is captured, which may
        outlive the layout.
        """
        if captures_graph():
            return make()
        if name not in self.memo:
            with torch.inference_mode(False):
                self.memo[name] = make()
        found: Made = self.memo[name]
        return found


def build_layout(mask: LazyMask) -> Layout | None:
    """The spans of a mask; None if the pattern is unknown, padding is non-contiguous, or a chunked mask has a cache.

    Reads padding values in one transfer to the host (`LazyMask.padding_on_host`).
    """
    pattern = mask.pattern
    if pattern is None:
        return None
    rows, _, q_length, kv_length = mask.shape
    start = mask.q_offset - mask.kv_offset  # the key index of the first query
    aligned = start == 0 and kv_length >= q_length
    if pattern.causal:
        visible = start + q_length
        if visible > kv_length:
            return None
    else:
        visible = kv_length
        aligned = kv_length == q_length and not (mask.crosses and mask.padding is not None)
        if pattern.window is not None and not aligned:
            return None
    if (mask.segments is not None or pattern.chunk is not None) and not aligned:
        return None
    real = _real_keys(None if mask.padding is None else mask.padding_on_host, rows, visible)
    if real is None:
        return None
    if mask.segments is not None and cast("Segments", mask.segments).stems is not None:
        return _layout_with_stems(mask)
    spans: list[Span] = []
    for row in range(rows):
        low, high = real[row]
        spans += _row_spans(mask, row, low, high, start, visible, aligned and (pattern.causal or q_length == visible))
    merged = _merge_equal_rows(spans, rows)
    return Layout(tuple(merged), pattern.causal, pattern.window, rows, q_length, kv_length)


def _layout_with_stems(mask: LazyMask) -> Layout | None:
    """The layout of a causal mask whose documents have stems; None with padding, which stems do not go around."""
    pattern, segments = cast("Pattern", mask.pattern), cast("Segments", mask.segments)
    rows, _, q_length, kv_length = mask.shape
    if mask.padding is not None or not pattern.causal or q_length != kv_length:
        return None
    spans, stems = [], []
    for row, (edges, of_row) in enumerate(zip(segments.boundaries, segments.stems or (), strict=True)):
        for (a, b), stem in zip(pairwise(edges), of_row, strict=True):
            front = total(stem)
            start, end = front, front + b - a
            while start < end:  # a chunk counts from the start of the stem
                first = 0 if pattern.chunk is None else start - start % pattern.chunk
                last = end if pattern.chunk is None else min(first + pattern.chunk, end)
                own = max(first, front)
                spans.append(Span(row, row + 1, a + start - front, a + last - front, a + own - front, a + last - front))
                stems.append(cut(stem, first, front))
                start = last
    has_stems = any(stems)
    return Layout(tuple(spans), True, pattern.window, rows, q_length, kv_length, tuple(stems) if has_stems else ())


def _row_spans(mask: LazyMask, row: int, low: int, high: int, start: int, visible: int, square: bool) -> list[Span]:
    pattern, q_length = cast("Pattern", mask.pattern), mask.shape[2]
    if not square:
        if pattern.causal:  # the queries are the last keys; those before `low` are padding
            first = max(low - start, 0)
            last = high - start
            if last <= first and q_length == 1 and high > low:  # a single query is read even if it is padding
                low = max(low, start + 1 - (pattern.window or visible))
                return [Span(row, row + 1, 0, 1, low, high)] if low < high else []
            return [Span(row, row + 1, first, last, low, high)] if last > first else []
        return [Span(row, row + 1, 0, q_length, low, high)] if high > low else []
    edges: tuple[int, ...] = (0, visible)
    if mask.segments is not None:
        edges = cast("Segments", mask.segments).boundaries[row]  # a traced mask has no layout (`LazyMask.whole`)
    spans = []
    for a, b in pairwise(edges):
        a, b = max(a, low), min(b, high)  # noqa: PLW2901
        if a >= b:
            continue
        step = pattern.chunk or b - a
        spans += [Span(row, row + 1, s, e, s, e) for s in range(a, b, step) for e in (min(s + step, b),)]
    return spans


def _real_keys(padding: torch.Tensor | None, rows: int, visible: int) -> list[tuple[int, int]] | None:
    """The range of real keys of each row; None if a row's real keys are not contiguous."""
    if padding is None:
        return [(0, visible)] * rows
    real = padding[:, :visible].to(torch.int32)
    first = real.argmax(-1)
    count = real.sum(-1)
    last = visible - real.flip(-1).argmax(-1)
    ranges: list[tuple[int, int]] = []
    for a, b, n in torch.stack([first, last, count], -1).tolist():
        if n == 0:
            ranges.append((0, 0))
        elif b - a != n:
            return None
        else:
            ranges.append((a, b))
    if len(ranges) == 1 and rows > 1:
        ranges *= rows
    return ranges


def _merge_equal_rows(spans: list[Span], rows: int) -> list[Span]:
    """Merges the spans of all rows if they are equal, so that a batch of unpacked rows stays one kernel call."""
    if rows == 1 or not spans or len(spans) % rows:
        return spans
    per_row = len(spans) // rows
    first = spans[:per_row]
    for row in range(rows):
        for a, b in zip(first, spans[row * per_row : (row + 1) * per_row], strict=True):
            if b.row0 != row or a[2:] != b[2:]:
                return spans
    return [Span(0, rows, *span[2:]) for span in first]
