"""What a model's outputs hold, by name: the one table of them. Caches are known by what they are, under any name."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch

from axattn.hf.caches import is_cache


class Holds(Enum):
    """What an output holds."""

    TOKENS = "a value of each token [B, S, ...]"
    LAYERS = "a tuple of such, by layer"
    ROUTING = "a tuple, by layer, of a value of each token along the rows [B * S, E]"
    ROWS = "a value of each row [B, ...]"
    WHOLE = "one value of the batch"


OUTPUTS = {
    "logits": Holds.TOKENS,
    "last_hidden_state": Holds.TOKENS,
    "prediction_logits": Holds.TOKENS,
    "hidden_states": Holds.LAYERS,
    "pooler_output": Holds.ROWS,
    "loss": Holds.WHOLE,
    "aux_loss": Holds.WHOLE,
    "router_logits": Holds.ROUTING,
}
"""The outputs that axattn knows; of a cache the name says nothing, and of any other nothing is known."""


def tensors_of(output: Any) -> Iterator[tuple[str, Holds | None, Any]]:
    """The outputs of a forward that hold tensors with a dimension, with what they hold, None where that is not known.

    Args:
        output: a ``ModelOutput``.
    """
    for key, value in output.items():
        parts = value if isinstance(value, tuple) else (value,)
        if not is_cache(value) and any(isinstance(x, torch.Tensor) and x.ndim for x in parts):
            yield key, OUTPUTS.get(key), value
