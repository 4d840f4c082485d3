"""Sparse attention: the keys that a model's indexer has selected, as a mask.

Under ``eager`` and ``sdpa`` such models put the selection into the mask themselves; under any other name they pass it
to the kernel (transformers 5.23).
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.backends.call import AttentionCall

SELECTIONS = ("indices", "block_indices")
"""The keywords of a selection, see `selected`."""


def selected(call: AttentionCall) -> torch.Tensor | None:
    """bool ``[B, 1 or H, S, T]``: True for a selected key; None if the call has no selection.

    ``indices``: int ``[B, S, topk]`` (DeepSeek V3.2). ``block_indices``: int ``[B, Hi, S, topk]``, the blocks of
    ``config.index_block_size`` keys that the indexer's heads selected, -1 for none (MiniMax M3).
    """
    indices, blocks = call.extras.get("indices"), call.extras.get("block_indices")
    keys = call.key.shape[2]
    if isinstance(indices, torch.Tensor):
        found = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
        return found.scatter(-1, indices.long(), True)[:, None]
    if isinstance(blocks, torch.Tensor):
        config: Any = call.module.config
        size = int(config.index_block_size)
        count = -(-keys // size)
        found = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool, device=blocks.device)
        found = found.scatter(-1, blocks.long().masked_fill(blocks < 0, count), True)[..., :count]
        found = found.repeat_interleave(size, -1)[..., :keys]
        return found.repeat_interleave(call.query.shape[1] // found.shape[1], 1)
    return None


def selected_in(call: AttentionCall, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor | None:
    """`selected` within documents: bool ``[documents, 1 or H, L, L]``; None if the call has no selection.

    Args:
        call: the call of the rows, whose indices are those of a row's keys.
        tokens: int64 ``[documents, L]``, the flat index of each query; its keys are the same tokens.
        starts: int64 ``[documents]``, the index of each document's first key in its row.
    """
    indices, blocks = call.extras.get("indices"), call.extras.get("block_indices")
    if isinstance(indices, torch.Tensor):
        chosen, size = indices[:, None], 1
    elif isinstance(blocks, torch.Tensor):
        config: Any = call.module.config
        chosen, size = blocks, int(config.index_block_size)
    else:
        return None
    count, length = tokens.shape
    first = starts // size  # the number of a document's first block, which may begin before it
    number = (starts[:, None] + torch.arange(length, device=tokens.device)) // size - first[:, None]
    blocks_here = length // size + 2
    rows = chosen.transpose(1, 2).flatten(0, 1).index_select(0, tokens.flatten())
    local = rows.view(count, length, *rows.shape[1:]).transpose(1, 2).long() - first[:, None, None, None]
    outside = (local < 0) | (local >= blocks_here)
    found = torch.zeros(*local.shape[:3], blocks_here + 1, dtype=torch.bool, device=tokens.device)
    found = found.scatter(-1, local.masked_fill(outside, blocks_here), True)
    kept = found.gather(-1, number[:, None, None].expand(*found.shape[:3], -1))
    return kept if size == 1 else kept.repeat_interleave(call.query.shape[1] // kept.shape[1], 1)


def only_selected(mask: torch.Tensor | None, kept: torch.Tensor) -> torch.Tensor:
    """A mask (bool: True attends; or additive) restricted to the keys in `kept`, the result of `selected`."""
    if mask is None:
        return kept
    if mask.dtype == torch.bool:
        return mask & kept
    return mask.masked_fill(~kept, torch.finfo(mask.dtype).min)
