"""M-RoPE: positions of several planes. Qwen-VL and GLM-4V count time, height and width separately.

In an image the planes differ, so positions of one plane suffice for text only. Without positions these models count
them over the whole row, which is right in each document because rotary embeddings depend on differences only.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.documents.boundaries import jumping_positions
from axattn.errors import Reason, UnsupportedAttentionError

_IMAGE_INPUTS = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
_POSITIONS = "position_ids"


def text_positions(positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """int64 ``[B or 1, S]`` that jump where a document starts, from planes ``[3, B or 1, S]`` without a text plane.

    A document starts where all planes are zero; of the other tokens only padding (0 in the mask ``[B, S]``) may be zero
    in all planes.
    """
    zero = (positions == 0).all(0)
    return jumping_positions((zero if mask is None else zero & (mask != 0).to(zero.device)).cumsum(-1))


def lacks_mrope_planes(inputs: dict[str, Any]) -> bool:
    """Whether a model with M-RoPE is given images but only one plane of positions (``[B, S]``, ``[1, B, S]``)."""
    positions = inputs.get(_POSITIONS)
    one = isinstance(positions, torch.Tensor) and (positions.ndim < 3 or positions.shape[0] == 1)
    return one and any(inputs.get(name) is not None for name in _IMAGE_INPUTS)


def without_positions(
    module: torch.nn.Module, names: tuple[str, ...], args: tuple[Any, ...], lengths: dict[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs without ``position_ids``, which the model then counts itself, but with `lengths`.

    Args:
        module: the model.
        names: of its positional parameters.
        args: its positional inputs.
        lengths: ``cu_seq_lens_*`` and ``max_length_*``, None if its forward doesn't take them.

    Raises:
        UnsupportedAttentionError: its forward takes no lengths.
    """
    if lengths is None:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} can't take packed rows with images",
            [Reason(_POSITIONS, "position_ids of one plane don't cover an image, and it takes no cu_seq_lens")],
            "Pass position_ids of 3 planes, or one document a row, padded.",
        )
    at = names.index(_POSITIONS) if _POSITIONS in names else len(args)
    if at < len(args):
        return (*args[:at], None, *args[at + 1 :]), lengths
    return args, {**lengths, _POSITIONS: None}
