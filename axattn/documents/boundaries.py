"""`Segments`: which tokens of each row belong to one document, computed once a forward.

Sources, in order of precedence: ``cu_seq_lens`` keywords, then ``position_ids`` together with a 2-D mask of document
ids. Tensor values are read in one transfer to the host per forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from axattn.errors import InvalidInputError, Reason
from axattn.hf.torch_internals import running_max
from axattn.hf.transfers import on_device

Ranges = tuple[tuple[int, int], ...]
"""Ranges ``[a, b)`` of tokens of one row, in the order in which they are read."""


@dataclass(frozen=True)
class Segments:
    """The documents of a packed batch of B rows of S tokens.

    A document may go on from an earlier one of its row, from its end or from its middle: the tokens before it, back to
    the start of the first document, are its *stem*. It attends to its stem and to itself, and its positions, windows
    and chunks count from the start of the stem.

    Attributes:
        boundaries: per row, the document boundaries ``(0, ..., S)``: n documents have n + 1 boundaries.
        device: where the tensors below live.
        stems: per row and document, the ranges of tokens of its stem, ``()`` for none; None if no document has one.
        memo: values derived from the documents once for all layers of a forward.
    """

    boundaries: tuple[tuple[int, ...], ...]
    device: torch.device
    stems: tuple[tuple[Ranges, ...], ...] | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """B."""
        return len(self.boundaries)

    @property
    def length(self) -> int:
        """S."""
        return self.boundaries[0][-1]

    @property
    def documents(self) -> int:
        """Number of documents in all rows."""
        return sum(len(row) - 1 for row in self.boundaries)

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one document."""
        return any(len(row) > 2 for row in self.boundaries)

    @property
    def first_document_length(self) -> int:
        """Length of the shortest first document of a row: up to there, every row is in its first document."""
        return min(row[1] for row in self.boundaries)

    @cached_property
    def document_ids(self) -> torch.Tensor:
        """int64 ``[B, S]``: the index of each token's document within its row."""
        rows = []
        for row in self.boundaries:
            lengths = torch.tensor([b - a for a, b in pairwise(row)])
            rows.append(torch.repeat_interleave(torch.arange(len(lengths)), lengths))
        return on_device(torch.stack(rows), self.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 ``[B, S]``: the position of each token within its document, from 0; its stem counts."""
        rows = []
        for row, edges in enumerate(self.boundaries):
            before = [0] * (len(edges) - 1) if self.stems is None else [total(stem) for stem in self.stems[row]]
            parts = zip(pairwise(edges), before, strict=True)
            rows.append(torch.cat([torch.arange(n, n + b - a) for (a, b), n in parts]))
        return on_device(torch.stack(rows), self.device)

    @cached_property
    def visible(self) -> torch.Tensor:
        """bool ``[B, S, S]``: whether the second token is in the document of the first or in its stem."""
        ids = self.document_ids
        same: torch.Tensor = ids[:, :, None] == ids[:, None, :]
        if self.stems is None:
            return same
        most = max(len(row) for row in self.boundaries) - 1
        in_stem = torch.zeros(self.rows, most, self.length, dtype=torch.bool)
        for row, stems in enumerate(self.stems):
            for number, stem in enumerate(stems):
                for a, b in stem:
                    in_stem[row, number, a:b] = True
        index = ids[:, :, None].expand(-1, -1, self.length)
        return same | on_device(in_stem, self.device).gather(1, index)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 ``[documents + 1]``: cumulative lengths over the flattened ``B * S`` tokens."""
        lengths = [b - a for row in self.boundaries for a, b in pairwise(row)]
        return on_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), self.device)

    def to(self, device: torch.device) -> Segments:
        """The same documents with tensors on `device`."""
        return self if device == self.device else Segments(self.boundaries, device, self.stems)


def total(ranges: Ranges) -> int:
    """The number of tokens in ranges."""
    return sum(b - a for a, b in ranges)


def cut(ranges: Ranges, low: int, high: int) -> Ranges:
    """Tokens ``[low, high)`` of ranges, counted along them, as ranges."""
    found, at = [], 0
    for a, b in ranges:
        first, last = max(low - at, 0), min(high - at, b - a)
        if first < last:
            found.append((a + first, a + last))
        at += b - a
    return tuple(found)


def from_cu_seqlens(cu_seqlens: torch.Tensor, rows: int, length: int, name: str = "cu_seq_lens_q") -> Segments:
    """Documents from cumulative lengths over the flattened ``rows * length`` tokens.

    Args:
        cu_seqlens: int32 ``[documents + 1]``.
        rows: B.
        length: S.
        name: the keyword that errors mention.

    Raises:
        InvalidInputError: wrong dtype or shape, not starting at 0, decreasing, not ending at the token count, or a
            document that spans two rows.
    """
    reasons: list[Reason] = []
    if not isinstance(cu_seqlens, torch.Tensor):
        raise InvalidInputError(f"{name} must be an int32 tensor, not {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        reasons.append(Reason(name, f"dtype is {_dtype_name(cu_seqlens.dtype)}, kernels read int32"))
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        reasons.append(Reason(name, f"shape is {list(cu_seqlens.shape)}, not [documents + 1]"))
        raise _invalid(name, reasons)
    ends = [int(value) for value in cu_seqlens.tolist()]
    tokens = rows * length
    if ends[0] != 0:
        reasons.append(Reason(name, f"starts at {ends[0]}, not 0"))
    if any(b < a for a, b in pairwise(ends)):
        at = next(i for i, (a, b) in enumerate(pairwise(ends)) if b < a)
        reasons.append(Reason(name, f"decreases from {ends[at]} to {ends[at + 1]} at index {at + 1}"))
    if ends[-1] != tokens:
        reasons.append(Reason(name, f"ends at {ends[-1]}, but the batch has {rows} x {length} = {tokens} tokens"))
    if reasons:
        raise _invalid(name, reasons)
    boundaries: list[tuple[int, ...]] = []
    known = set(ends)
    for row in range(rows):
        low, high = row * length, (row + 1) * length
        if low not in known or high not in known:
            at = low if low not in known else high
            raise _invalid(name, [Reason(name, f"a document spans two rows (token {at} is inside it)")])
        boundaries.append(tuple(sorted({end - low for end in ends if low <= end <= high})))
    return Segments(tuple(boundaries), cu_seqlens.device)


def holds_document_ids(attention_mask: torch.Tensor) -> bool:
    """Whether a 2-D mask ``[B, S]`` holds document ids: a value above 1. Reads its maximum on the host."""
    return attention_mask.dtype is not torch.bool and attention_mask.numel() > 0 and bool(attention_mask.max() > 1)


def from_positions(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    rows: int,
    length: int,
    has_document_ids: bool | None = None,
) -> Segments | None:
    """Documents from positions and a 2-D mask; None when every row is one document.

    `starts_of` defines where documents start. In packed rows, padding in front of a row's first document does not
    belong to it: it gets its own boundaries.

    Args:
        position_ids: integer ``[B, S]``, ``[1, S]`` or ``[S]``, or None.
        attention_mask: ``[B, S]``, or None. Values above 1 are document ids.
        rows: B.
        length: S.
        has_document_ids: the result of `holds_document_ids` for the mask, None if not computed yet.

    Raises:
        InvalidInputError: positions restart or jump inside a document of the mask.
    """
    if length < 2:
        return None
    if attention_mask is not None and has_document_ids is None:
        has_document_ids = holds_document_ids(attention_mask)
    if position_ids is None and not has_document_ids:
        return None  # padding alone starts no document
    given = starts_of(position_ids, attention_mask, bool(has_document_ids))
    starts = given.by_document_id if given.by_document_id is not None else given.by_position
    if starts is None:
        return None
    if given.by_document_id is not None and given.by_position is not None and attention_mask is not None:
        _require_agreement(given.by_position & ~given.by_document_id, attention_mask)
    if given.padding_ends is not None:
        starts = starts | (given.padding_ends & starts.any())
    found = starts.cpu().nonzero().tolist()  # the one transfer to the host
    if not found:
        return None
    if starts.shape[0] == 1 and rows > 1:
        found = [(row, at) for row in range(rows) for _, at in found]
    per_row: list[list[int]] = [[0] for _ in range(rows)]
    for row, at in found:
        per_row[row].append(at + 1)
    return Segments(tuple((*row, length) for row in per_row), starts.device)


class Starts(NamedTuple):
    """Where documents start according to each input: bool ``[B or 1, S - 1]``, from a row's second token on.

    Attributes:
        by_position: positions don't continue; None without positions.
        by_document_id: document ids change; None for a mask without document ids.
        padding_ends: the padding in front of a row ends; None without a mask.
    """

    by_position: torch.Tensor | None
    by_document_id: torch.Tensor | None
    padding_ends: torch.Tensor | None


def starts_of(positions: torch.Tensor | None, mask: torch.Tensor | None, has_document_ids: bool) -> Starts:
    """Where documents start according to positions and a 2-D mask. Reads no values, so it can be traced.

    Padding (mask 0) starts no document, and its positions are ignored. A real token is compared with the last real
    token before it. Its position continues if it is one higher (padding in between not counted: ``cumsum(mask) - 1``,
    as in ``generate``), or higher by their distance in the row (padding counted). A different document id starts a
    new document, also if the id is lower or occurred before.

    Args:
        positions: integers ``[B, S]``, ``[1, S]`` or ``[S]``, or None.
        mask: ``[B, S]``, nonzero for real tokens, or None.
        has_document_ids: the mask holds document ids, or may hold them.
    """
    if positions is not None:
        positions = positions.reshape(-1, positions.shape[-1]).long()
    if mask is None:
        by_position = None if positions is None else positions[:, 1:] != positions[:, :-1] + 1
        return Starts(by_position, None, None)
    if positions is not None:
        rows = max(positions.shape[0], mask.shape[0])
        positions, mask = positions.expand(rows, -1), mask.to(positions.device).expand(rows, -1)
    real, index = mask != 0, torch.arange(mask.shape[-1], device=mask.device)
    before = running_max(torch.where(real, index, -1))[:, :-1]  # the last real token, -1 for none
    first, last = before < 0, before.clamp(min=0)
    real = real[:, 1:]
    assume = real & ~first
    by_position = by_document_id = None
    if positions is not None:
        step = positions[:, 1:] - positions.gather(1, last)
        by_position = assume & (step != 1) & (step != index[1:] - before)
    if has_document_ids:
        by_document_id = assume & (mask[:, 1:] != mask.gather(1, last))
    return Starts(by_position, by_document_id, real & first)


def _require_agreement(against: torch.Tensor, document_ids: torch.Tensor) -> None:
    if bool(against.any()):
        row, at = against.nonzero()[0].tolist()
        number = int(document_ids.expand(len(against), -1)[row, at + 1])
        raise InvalidInputError(
            "position_ids and the document ids (attention_mask, seq_idx) disagree",
            [Reason("position_ids", f"row {row}: they jump at token {at + 1}, inside document {number}")],
            "Pass position_ids with a 0/1 mask, or document ids without position_ids.",
        )


def jumping_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Positions ``[B, S]`` that jump where `document_ids` ``[B, S]`` change, for `from_positions`."""
    return torch.arange(document_ids.shape[-1], device=document_ids.device) + 2 * document_ids


def documents_in(segments: Segments, mask: torch.Tensor | None) -> int:
    """The number of documents with a real token, for errors: padding in front of a row is not counted."""
    if mask is None or tuple(mask.shape) != (segments.rows, segments.length):
        return segments.documents
    real = (mask != 0).tolist()
    return sum(any(real[row][a:b]) for row, edges in enumerate(segments.boundaries) for a, b in pairwise(edges))


def _invalid(name: str, reasons: Sequence[Reason]) -> InvalidInputError:
    advice = "Build it as torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), or use PackingCollator."
    return InvalidInputError(f"{name} can't be used", reasons, advice)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
