"""Patch: a pooler that reads the first token of each row (BERT's) is handed whole rows while they run unpadded."""

from __future__ import annotations

from typing import Any

import torch

from axattn.documents.forward_context import current
from axattn.hf.module_walk import modules_of
from axattn.patches.forward_wrapper import Forward, add_entrance
from axattn.patches.patchset import PatchSet
from axattn.traits.pooling import first_token_pooler


def add_whole_rows(patches: PatchSet, model: torch.nn.Module) -> None:
    """Let the poolers of a model, and of the models inside it, read padded rows."""
    from transformers import PreTrainedModel

    for inner in [module for module in modules_of(model) if isinstance(module, PreTrainedModel)]:
        pooler = first_token_pooler(inner)
        if pooler is not None:
            add_entrance(patches, pooler, _whole_rows)


def _whole_rows(pooler: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
    """One forward of a pooler, whose one input is ``[B, S, D]``."""
    context = current()
    while context is not None and context.unpadded is None:
        context = context.outer
    if context is not None and context.unpadded is not None:
        unpadded = context.unpadded
        inputs = {name: unpadded.restore(x) if unpadded.holds(x) else x for name, x in inputs.items()}
    return forward(inputs)
