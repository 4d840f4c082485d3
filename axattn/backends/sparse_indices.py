"""Sparse attention: the keys that a model's indexer has selected, as a mask.

Under ``eager`` and ``sdpa`` such models put the selection into the mask themselves; under any other name they pass it
to the kernel (transformers 5.23).
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.backends.call import AttentionCall


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


def only_selected(mask: torch.Tensor | None, kept: torch.Tensor) -> torch.Tensor:
    """A mask (bool: True attends; or additive) restricted to the keys in `kept`, the result of `selected`."""
    if mask is None:
        return kept
    if mask.dtype == torch.bool:
        return mask & kept
    return mask.masked_fill(~kept, torch.finfo(mask.dtype).min)
