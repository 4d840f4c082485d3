"""Patch: ESM's "token dropout" in packed rows, by document.

Its embeddings are scaled by the share of masked tokens in a row (ESM-2 was trained so, and its checkpoints enable it;
transformers 5.23, ``EsmEmbeddings``): in a packed row each document would be scaled by the share of the whole row.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.documents.boundaries import Segments
from axattn.documents.document_rows import as_rows
from axattn.documents.forward_context import current
from axattn.patches.forward_wrapper import Forward, add_wrapper
from axattn.patches.patchset import PatchSet
from axattn.traits.token_mixers import scaled_by_share, text_model


def add_shares_by_document(patches: PatchSet, model: torch.nn.Module) -> None:
    """Scale such embeddings by each document's share of masked tokens instead of the row's."""
    for _, embeddings in scaled_by_share(text_model(model)):
        add_wrapper(patches, embeddings, _by_document)


def _by_document(module: Any, forward: Forward, inputs: dict[str, Any]) -> Any:
    """Run the embeddings on the documents as rows, and put the outputs back in place."""
    context, ids = current(), inputs.get("input_ids")
    segments = None if context is None else context.segments
    if not isinstance(segments, Segments) or ids is None or ids.shape != (segments.rows, segments.length):
        return forward(inputs)
    documents = as_rows(segments, ids.device)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    other = int(module.mask_token_id == 0)  # any token but the mask token
    parts = []
    for group in documents.groups:
        real = group.real if mask is None else group.real & (mask.flatten()[group.tokens] != 0)
        real = real | ~real.any(-1, keepdim=True)  # padding before packed rows: the share of no tokens would be NaN
        given = {"input_ids": ids.flatten()[group.tokens].masked_fill(~real, other), "attention_mask": real.long()}
        if positions is not None:
            given["position_ids"] = positions.expand(ids.shape).flatten()[group.tokens]
        parts.append(group.select_real(forward({**inputs, **given})))
    return documents.in_packed_order(parts).view(*ids.shape, -1)
