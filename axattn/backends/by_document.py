"""`by_document`: runs an attention function on the documents of packed or padded rows, as rows of their own.

For functions that know dense masks only (the model's eager function, ``F.scaled_dot_product_attention`` with a bias or
dropout): time and memory follow the sum of L x L over documents, not S x S. Varlen kernels need none of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from axattn.backends.call import AttentionCall
from axattn.backends.sparse_indices import SELECTIONS, only_selected, selected_in
from axattn.hf.torch_internals import is_tracing
from axattn.hf.transfers import on_device
from axattn.masks.dense_rule import dense_rule
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.varlen_layout import Layout

CALL = {"cpu": 1 << 16, "gpu": 1 << 22}
"""What a further call of the function costs, copies to and from it included: the time of so many weights (all heads),
forward and backward. Measured on a CPU (benchmarks/NOTES.md), estimated for GPUs from some forty kernel launches."""
_SAME_LENGTH = 1.25
"""Lengths in one group differ by less than this factor: padding then adds at most 56 % to L x L, and documents of up to
4,096 tokens make at most 26 groups."""
_SHORT = 16
"""Up to this length documents form one group: a call takes longer than what padding adds."""


class Document(NamedTuple):
    """Tokens ``[start, start + length)`` of a row."""

    row: int
    start: int
    length: int


class Group(NamedTuple):
    """Documents of like length as rows, padded at the end.

    Attributes:
        documents: the rows.
        length: L, that of the longest.
        tokens: int64 ``[documents, L]``, the flat index of each token; padding repeats a document's last token.
        starts: int64 ``[documents]``, the index of each first token in its row.
        mask: bool ``[documents or 1, 1, L, L]`` (True: attend); None if causality says it all. Causal rows need no
            padding mask, because no token attends to the padding after it.
        window: of `mask`, None if it hides nothing of L tokens.
    """

    documents: tuple[Document, ...]
    length: int
    tokens: torch.Tensor
    starts: torch.Tensor
    mask: torch.Tensor | None
    window: int | None

    def on(self, device: torch.device) -> Group:
        """The same on a device."""
        mask = None if self.mask is None else on_device(self.mask, device)
        tokens, starts = on_device(self.tokens, device), on_device(self.starts, device)
        return self._replace(tokens=tokens, starts=starts, mask=mask)


class Rows(NamedTuple):
    """The documents of a layout as rows.

    Attributes:
        groups: together they hold every real token.
        tokens: int64 ``[N]``: `Group.tokens` of all groups.
        back: int64 ``[B * S]``: the index of each token in ``[N]``; N for padding.
        length: S. A static cache has more keys, all of them after the documents.
        padded: whether there is padding in the batch.
    """

    groups: tuple[Group, ...]
    tokens: torch.Tensor
    back: torch.Tensor
    length: int
    padded: bool

    def take(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``[B, H, S, D]`` as ``[documents, H, L, D]`` of each group; of keys the first S."""
        flat = x[:, :, : self.length].transpose(1, 2).flatten(0, 1).index_select(0, self.tokens)
        sizes = [group.tokens.numel() for group in self.groups]
        return [
            part.view(*group.tokens.shape, *x.shape[1::2]).transpose(1, 2)
            for part, group in zip(torch.split(flat, sizes), self.groups, strict=True)
        ]

    def put_back(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Outputs ``[documents, L, ...]`` of each group as ``[B * S, ...]``, zero at padding."""
        flat = [part.flatten(0, 1) for part in parts]
        if self.padded:
            flat.append(flat[0].new_zeros(1, *flat[0].shape[1:]))
        return torch.cat(flat).index_select(0, self.back)


def by_document(call: AttentionCall, attention: Callable[[AttentionCall], torch.Tensor]) -> torch.Tensor | None:
    """Run an attention function on the documents of a call's rows; None if it should see the call as it is.

    Documents stay together while tracing (a graph would hold one batch's lengths), over a cache, and if it does not pay
    (`pays`).

    Args:
        call: any; `AttentionCall.weights` is set if they are requested.
        attention: takes a call with a tensor or None as its mask; returns ``[B, S, H, Dv]``.

    Returns:
        ``[B, S, H, Dv]``, zero at padding.
    """
    mask = call.mask
    if is_tracing() or not isinstance(mask, LazyMask) or mask.as_flag is not None:
        return None
    layout = mask.layout()
    if layout is None:
        return None
    device, (B, heads, S, _), T = call.query.device, call.query.shape, call.key.shape[2]
    members = layout.kept("documents by length", lambda: documents_by_length(layout))
    if layout.rows != B or not pays(members, layout, heads, device):
        return None
    bias, sinks = call.bias, call.sinks
    if bias is not None and (bias.ndim != 4 or bias.shape[0] not in (1, B) or bias.shape[2:] != (S, T)):
        return None
    rows = layout.kept("documents as rows", lambda: as_rows(members, layout, device))
    calls = [
        dataclasses.replace(call, query=q, key=k, value=v, mask=group.mask, causal=layout.causal, window=group.window)
        for group, q, k, v in zip(rows.groups, *map(rows.take, (call.query, call.key, call.value)), strict=True)
    ]
    if bias is not None:
        for each, part in zip(calls, _diagonal_blocks(bias[..., :S], rows, B), strict=True):
            each.bias = part
            each.extras = {**each.extras, "position_bias": part}
    if sinks is not None and sinks.ndim == 4:  # a sink per token, [B, H, S, 1] (Inkling 2)
        for each, part in zip(calls, rows.take(sinks), strict=True):
            each.sinks = part
            each.extras = {key: part if x is sinks else x for key, x in each.extras.items()}
    for each, group in zip(calls, rows.groups, strict=True):
        kept = selected_in(call, group.tokens, group.starts)
        if kept is not None:
            each.mask = only_selected(each.dense_mask(), kept)
            each.extras = {key: x for key, x in each.extras.items() if key not in SELECTIONS}
    out = rows.put_back([attention(each) for each in calls])
    if call.want_weights:
        weights = _whole_weights([_given(each.weights) for each in calls], rows, B)
        call.weights = F.pad(weights, (0, T - S))
    return out.view(B, S, *out.shape[1:])


def documents_by_length(layout: Layout) -> list[list[Document]]:
    """The documents of a layout, those of like length together, longest first; empty if its spans are no documents
    (queries over a cache) or go on from others."""
    if layout.whole_rows or layout.stems or any((s.q0, s.q1) != (s.k0, s.k1) for s in layout.spans):
        return []
    documents = [Document(row, s.q0, s.q1 - s.q0) for s in layout.spans for row in range(s.row0, s.row1)]
    found: list[list[Document]] = []
    for document in sorted(documents, key=lambda document: -document.length):
        longest = found[-1][0].length if found else 0
        if found and (longest <= _SHORT or longest < _SAME_LENGTH * document.length):
            found[-1].append(document)
        else:
            found.append([document])
    return found


def pays(members: list[list[Document]], layout: Layout, heads: int, device: torch.device) -> bool:
    """Whether the weights that documents as rows save, S x T less the padded L x L, are worth a call for each group."""
    work = sum(len(each) * each[0].length ** 2 for each in members)
    saved = heads * (layout.rows * layout.q_length * layout.kv_length - work)
    return bool(members) and saved >= len(members) * CALL["cpu" if device.type == "cpu" else "gpu"]


def as_rows(members: list[list[Document]], layout: Layout, device: torch.device) -> Rows:
    """The documents of a layout as rows, one group for each list of `documents_by_length`."""
    groups, real = [], []
    for each in members:
        length = each[0].length
        starts, lengths = torch.tensor([(d.row * layout.q_length + d.start, d.length) for d in each]).unbind(1)
        at = torch.arange(length)
        tokens = starts[:, None] + torch.minimum(at, lengths[:, None] - 1)
        real.append(at < lengths[:, None])
        window = None if layout.window is None or layout.window >= length else layout.window
        mask = _mask_of(real[-1], layout.causal, window)
        groups.append(Group(tuple(each), length, tokens, starts % layout.q_length, mask, window))
    tokens, is_real = torch.cat([group.tokens.flatten() for group in groups]), torch.cat([x.flatten() for x in real])
    back = torch.full((layout.rows * layout.q_length,), len(tokens))
    back[tokens[is_real]] = is_real.nonzero()[:, 0]
    padded = bool((back == len(tokens)).any())
    there = [group.on(device) for group in groups]
    return Rows(tuple(there), on_device(tokens, device), on_device(back, device), layout.q_length, padded)


def _mask_of(real: torch.Tensor, causal: bool, window: int | None) -> torch.Tensor | None:
    """The mask of a group whose tokens are `real` (bool ``[documents, L]``), see `Group.mask`."""
    length = real.shape[1]
    if causal or bool(real.all()):
        return None if window is None else dense_rule(length, length, causal=causal, window=window)
    mask = dense_rule(length, length, causal=False, window=window, padding=real)
    return (
        mask | ~real[:, None, :, None]
    )  # padding attends to something: no NaN, which would reach the gradient of keys


def _diagonal_blocks(bias: torch.Tensor, rows: Rows, batch: int) -> list[torch.Tensor]:
    """The bias ``[1 or B, H, S, S]`` within each document: ``[documents, H, L, L]`` of each group.

    By `split`, whose backward joins its parts once; slices would each make a gradient of S x S.
    """
    by_row = bias.unbind()
    blocks: dict[Document, torch.Tensor] = {}
    for row, parts in enumerate(_cover(rows, batch)):
        whole = torch.split(by_row[row if len(by_row) > 1 else 0], [part.length for part in parts], dim=1)
        for part, piece in zip(parts, whole, strict=True):
            blocks[part] = piece.narrow(2, part.start, part.length)

    def padded(document: Document, length: int) -> torch.Tensor:
        return F.pad(blocks[document], (0, length - document.length) * 2)

    return [torch.stack([padded(each, group.length) for each in group.documents]) for group in rows.groups]


def _whole_weights(parts: list[torch.Tensor], rows: Rows, batch: int) -> torch.Tensor:
    """The weights ``[documents, H, L, L]`` of each group as ``[B, H, S, S]``, zero outside documents and at padding."""
    blocks = {
        document: weights[:, : document.length, : document.length]
        for group, part in zip(rows.groups, parts, strict=True)
        for document, weights in zip(group.documents, part.unbind(), strict=True)
    }
    heads, length = parts[0].shape[1], rows.length

    def line(part: Document) -> torch.Tensor:
        if part not in blocks:
            return parts[0].new_zeros(heads, part.length, length)
        return F.pad(blocks[part], (part.start, length - part.start - part.length))

    return torch.stack([torch.cat([line(part) for part in each], 1) for each in _cover(rows, batch)])


def _given(weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        raise AssertionError("the attention function returned no weights")
    return weights


def _cover(rows: Rows, batch: int) -> list[list[Document]]:
    """For each row, its documents and the padding between them, in order, from 0 to S."""
    found: list[list[Document]] = [[] for _ in range(batch)]
    for document in sorted(document for group in rows.groups for document in group.documents):
        found[document.row].append(document)
    covered = []
    for row, documents in enumerate(found):
        parts, at = [], 0
        for document in [*documents, Document(row, rows.length, 0)]:
            if document.start > at:
                parts.append(Document(row, at, document.start - at))
            if document.length:
                parts.append(document)
            at = document.start + document.length
        covered.append(parts)
    return covered
