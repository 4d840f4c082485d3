"""Refuses packed positions that a wrapper around a model got and did not pass on: documents would leak silently.

PEFT's prompt tuning, p-tuning and CPT prepend their own tokens to a row and drop ``position_ids`` with a warning (peft
0.21). A model does not get its wrapper's inputs, so this reads the frames of the calls that lead to it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from axattn.documents.boundaries import documents_in, from_positions
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.torch_internals import calls_around, is_tracing

_DESCRIPTIONS = frozenset({"position_ids", "attention_mask"})


def require_positions_passed_on(module: torch.nn.Module, rows: int, length: int) -> None:
    """Raise if a module around this one got packed positions and this one none; or if it got a mask of document ids and
    changed the length of its rows: tokens that it prepends would belong to the first document only.

    Args:
        module: a model that got neither positions nor lengths, in its forward pre-hook.
        rows: B of its tokens. A wrapper that gives each document a separate row changes it, and is not refused.
        length: S of its tokens.

    Raises:
        UnsupportedAttentionError: a wrapper dropped the documents.
    """
    own, around = calls_around(module, _DESCRIPTIONS)
    # contract "calls of modules": else a wrapper can't be detected
    if not own and "peft.peft_model" in sys.modules and not is_tracing():
        raise UnsupportedAttentionError(
            f"{type(module).__name__} can't run without position_ids here",
            [Reason("position_ids", "whether a wrapper (PEFT's prompt tuning) dropped them can't be seen here")],
            "Pass position_ids.",
        )
    for wrapper, tokens, given in around:
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        positions = positions if _is_2d(positions) else None
        mask = mask if _is_2d(mask) else None
        description = positions if positions is not None else mask
        if description is None or (description.shape[0] if tokens is None else tokens.shape[0]) != rows:
            continue
        if is_tracing():  # no values to read
            return
        shape = (rows, description.shape[1])
        if positions is None and shape[1] == length:
            continue
        mask = mask if mask is not None and mask.shape == shape else None
        found = from_positions(positions, mask, *shape)
        if found is not None and found.packed:
            name, several = type(wrapper).__name__, documents_in(found, mask)
            text = f"{name} was given position_ids and did not pass them on"
            if positions is None:
                text = f"{name} was given rows of {shape[1]} tokens and turned them into rows of {length}"
            raise UnsupportedAttentionError(
                f"packed rows ({several} documents in {rows} rows) would leak in {type(module).__name__}",
                [Reason("position_ids", text)],
                "Give it one document a row, padded.",
            )


def _is_2d(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim == 2
