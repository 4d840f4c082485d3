"""Positions that a wrapper around a model was given and did not hand on: documents would leak, and nobody would know.

PEFT's prompt tuning, p-tuning and CPT put their own tokens in front of a row and drop ``position_ids`` with a warning
(peft 0.21). A model can't see what its wrapper was given, so this looks at the calls that lead to it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from axattn.documents.boundaries import documents_in, from_positions
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.torch_internals import calls_around


def require_handed_on(module: torch.nn.Module, rows: int, length: int) -> None:
    """Raise where a module around this one was given packed positions, and this one none; or documents numbered in the
    mask, and rows of another length: tokens that it put in front are the first document's alone.

    Args:
        module: a model that was given no positions and no lengths, in its forward pre-hook.
        rows: B of its tokens. A wrapper that gives each document a row of its own changes it, and has done all there
            is to do.
        length: S of its tokens.

    Raises:
        UnsupportedAttentionError: it was.
    """
    own, around = calls_around(module)
    if not own and "peft.peft_model" in sys.modules:  # a wrapper could not be seen: contract "calls of modules"
        raise UnsupportedAttentionError(
            f"{type(module).__name__} can't run without position_ids here",
            [Reason("position_ids", "that a wrapper (PEFT's prompt tuning) dropped them can't be seen here")],
            "Give position_ids.",
        )
    for wrapper, tokens, given in around:
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        positions = positions if _is_2d(positions) else None
        mask = mask if _is_2d(mask) else None
        described = positions if positions is not None else mask
        if described is None or (described.shape[0] if tokens is None else tokens.shape[0]) != rows:
            continue
        shape = (rows, described.shape[1])
        if positions is None and shape[1] == length:
            continue
        mask = mask if mask is not None and mask.shape == shape else None
        found = from_positions(positions, mask, *shape)
        if found is not None and found.packed:
            name, several = type(wrapper).__name__, documents_in(found, mask)
            text = f"{name} was given position_ids and did not hand them on"
            if positions is None:
                text = f"{name} was given rows of {shape[1]} tokens and made rows of {length} of them"
            raise UnsupportedAttentionError(
                f"packed rows ({several} documents in {rows} rows) would leak in {type(module).__name__}",
                [Reason("position_ids", text)],
                "Give it one document a row, padded.",
            )


def _is_2d(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim == 2
