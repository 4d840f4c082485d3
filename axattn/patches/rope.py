"""Patch: LongRoPE in packed rows, where each document gets the factors that it would get alone."""

from __future__ import annotations

from typing import Any

import torch

from axattn.documents.forward_context import current, slot
from axattn.patches.patchset import PatchSet
from axattn.traits import dynamic_rope


def add_rope_by_document(patches: PatchSet, model: torch.nn.Module) -> None:
    """Put a hook on the LongRoPE embeddings of a model.

    Args:
        patches: records the hooks.
        model: the whole model.
    """
    for module in dynamic_rope.longropes(model):
        patches.add_handle(module.register_forward_hook(_by_document, with_kwargs=True))


def _by_document(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a rotary embedding: ``cos`` and ``sin`` ``[B, S, D]``, by the highest position of each document.

    The module chooses one set by the highest position of the batch, so it runs once more with positions clamped to the
    short range (always: a check would need the host). Unpadded rows (``unpad=True``) are not changed, because they must
    equal the padded batch.
    """
    context = current()
    segments = None if context is None or slot().known_documents is not None else context.documents
    given = {**dict(zip(("x", "position_ids", "layer_type"), args, strict=False)), **kwargs}
    positions, layer = given["position_ids"], given.get("layer_type")
    if context is None or segments is None or dynamic_rope.kind(module, layer) != dynamic_rope.LONGROPE:
        return None
    if positions.shape[-1] != segments.length:
        return None
    limit = dynamic_rope.limit(module, layer)
    ids = segments.document_ids.to(positions.device)
    at = positions.reshape(-1, positions.shape[-1]).to(ids.dtype).expand(ids.shape)
    mask = context.bounds.mask
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        at = at.masked_fill(mask.to(at.device) == 0, -1)
    last = torch.full_like(ids, -1).scatter_reduce(1, ids, at, "amax").gather(1, ids)
    long = (last >= limit)[..., None]  # [B, S, 1]
    short = module.forward(**{**given, "position_ids": positions.clamp(max=limit - 1)})
    return tuple(torch.where(long, whole, part) for whole, part in zip(output, short, strict=True))
