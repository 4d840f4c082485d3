"""Positions of several planes: multimodal rotary embeddings (Qwen-VL, GLM-4V) count time, height and width apart.

In an image the planes differ, so positions of one plane do for text alone. Without any these models count by
themselves, and as rotary embeddings see differences only, what they count over a whole row is right in each document.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.documents.boundaries import jumps
from axattn.errors import Reason, UnsupportedAttentionError

_SEEN = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
_POSITIONS = "position_ids"


def text_positions(positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """int64 ``[B or 1, S]`` that jump where a document starts, from planes ``[3, B or 1, S]`` without one of text.

    A document starts where all planes are zero; no later token of it is there, but padding (0 in the mask ``[B, S]``)
    may be.
    """
    zero = (positions == 0).all(0)
    return jumps((zero if mask is None else zero & (mask != 0).to(zero.device)).cumsum(-1))


def lacks_mrope_planes(inputs: dict[str, Any]) -> bool:
    """Whether a model that takes planes is given images, and positions of one plane (``[B, S]``, ``[1, B, S]``)."""
    positions = inputs.get(_POSITIONS)
    one = isinstance(positions, torch.Tensor) and (positions.ndim < 3 or positions.shape[0] == 1)
    return one and any(inputs.get(name) is not None for name in _SEEN)


def left_to_model(
    module: torch.nn.Module, names: tuple[str, ...], args: tuple[Any, ...], lengths: dict[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs that let a model count positions by itself, and tell it the documents.

    Args:
        module: the model.
        names: of its positional parameters.
        args: its positional inputs.
        lengths: ``cu_seq_lens_q`` and the rest, None where its forward takes none.

    Raises:
        UnsupportedAttentionError: it takes no lengths.
    """
    if lengths is None:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} can't take packed rows with images",
            [Reason(_POSITIONS, "position_ids of one plane say nothing of an image, and it takes no cu_seq_lens")],
            "Give position_ids of 3 planes, or one document a row, padded.",
        )
    at = names.index(_POSITIONS) if _POSITIONS in names else len(args)
    if at < len(args):
        return (*args[:at], None, *args[at + 1 :]), lengths
    return args, {**lengths, _POSITIONS: None}
