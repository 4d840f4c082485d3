"""Documents while ``torch.compile`` traces: tensors only, because no value can be read before the graph runs.

`TracedSegments` replaces `axattn.documents.boundaries.Segments` there. Whether a batch is packed is unknown while
tracing, so everything here works for packed and for unpacked batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from axattn.documents import boundaries
from axattn.documents.boundaries import Segments, starts_of
from axattn.errors import InvalidInputError
from axattn.hf.graph_handles import entry_of
from axattn.hf.tensor_snapshots import READS_ON_HOST, snapshot
from axattn.hf.torch_internals import require_when_run, running_max


@dataclass(frozen=True)
class TracedSegments:
    """The documents of a batch as a tensor.

    Attributes:
        document_ids: int64 ``[B, S]``: the index of each token's document within its row.
        rows: B.
        length: S.
    """

    document_ids: torch.Tensor
    rows: int
    length: int

    documents: None = None
    """The number of documents is unknown while tracing."""

    @property
    def positions(self) -> torch.Tensor:
        """int64 ``[B, S]``: the position of each token within its document, from 0."""
        ids = self.document_ids
        index = torch.arange(self.length, device=ids.device).expand(self.rows, self.length)
        starts = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        return index - running_max(torch.where(starts, index, 0))

    @property
    def first_document_length(self) -> torch.Tensor:
        """int64 ``[]``: the length of the shortest first document of a row; 2**62 when every row is one document."""
        return torch.where((self.document_ids > 0).any(), (self.document_ids == 0).sum(-1).min(), 2**62)

    def read(self) -> Segments | None:
        """The same documents with boundaries read on the host, None when every row is one. Not while tracing."""
        found = boundaries.from_positions(boundaries.jumping_positions(self.document_ids), None, self.rows, self.length)
        return found if found is not None and found.packed else None

    def require_single(self, text: str, unless: torch.Tensor | None = None) -> None:
        """Assert, when the graph runs, that every row is one document or that `unless` (a bool scalar) holds; `text` is
        the reason in the error."""
        single = (self.document_ids == 0).all()
        require_when_run(single if unless is None else single | unless.to(single.device), text)

    def snapshot(self) -> TracedSegments:
        """The same documents in a tensor snapshot, so that operators of a graph may cache what they read from it."""
        return TracedSegments(snapshot(self.document_ids), self.rows, self.length)

    def to(self, device: torch.device) -> TracedSegments:
        """The same documents on `device`."""
        return TracedSegments(self.document_ids.to(device), self.rows, self.length)


@torch.library.custom_op("axattn::document_ids", mutates_args=(), tags=READS_ON_HOST)
def document_ids_op(handle: torch.Tensor, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """int64 ``[B, S]``: the document ids of the `Segments` behind a handle (`axattn.hf.graph_handles`), which were read
    on `device` before the graph ran."""
    found: torch.Tensor = entry_of(handle).value.document_ids
    return found.clone()


@document_ids_op.register_fake
def _(handle: torch.Tensor, rows: int, length: int, device: torch.device) -> torch.Tensor:
    return handle.new_empty(rows, length, device=device)


def from_cu_seqlens(cu_seqlens: torch.Tensor, rows: int, length: int, name: str) -> TracedSegments:
    """As `axattn.documents.boundaries.from_cu_seqlens`; the graph asserts conditions on values when it runs.

    Raises:
        InvalidInputError: wrong dtype or shape.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise InvalidInputError(f"{name} must be an int32 tensor [documents + 1]")
    total = rows * length
    whole = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    require_when_run(whole, f"{name} must start at 0, never decrease and end at the token count")
    flat = torch.searchsorted(cu_seqlens, torch.arange(total, device=cu_seqlens.device, dtype=torch.int32), right=True)
    ids = flat.view(rows, length)
    edges = torch.arange(1, rows, device=ids.device)
    require_when_run((ids[edges, 0] != ids[edges - 1, -1]).all(), f"a document of {name} spans two rows")
    return TracedSegments(ids - ids[:, :1], rows, length)


def from_positions(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, rows: int, length: int
) -> TracedSegments | None:
    """As `axattn.documents.boundaries.from_positions`; None only without inputs to read documents from."""
    if length < 2 or (position_ids is None and attention_mask is None):
        return None
    has_document_ids = attention_mask is not None and attention_mask.dtype is not torch.bool
    by_position, by_document_id, padding_ends = starts_of(position_ids, attention_mask, has_document_ids)
    starts = by_position if by_document_id is None else by_document_id
    if starts is None:
        return None
    if by_position is not None and by_document_id is not None and attention_mask is not None:
        agreed = (attention_mask.max() <= 1).to(starts.device) | by_document_id | ~by_position
        require_when_run(agreed.all(), "position_ids and the document ids disagree")
        starts = by_position | by_document_id
    if padding_ends is not None:
        starts = starts | (padding_ends & starts.any())
    ids = torch.nn.functional.pad(starts.cumsum(-1), (1, 0))
    return TracedSegments(ids.expand(rows, length), rows, length)
