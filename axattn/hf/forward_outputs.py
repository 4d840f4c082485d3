"""The table of a model's outputs by name. Caches are recognised under any name."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch

from axattn.hf.caches import is_cache


class Holds(Enum):
    """What an output holds."""

    TOKENS = "a value per token [B, S, ...]"
    LAYERS = "a tuple of these, by layer"
    ROUTING = "a tuple, by layer, of a value per token of all rows [B * S, E]"
    ROWS = "a value per row [B, ...]"
    WHOLE = "one value per batch"


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
"""The known outputs; others are unknown, except caches."""


def tensors_of(output: Any) -> Iterator[tuple[str, Holds | None, Any]]:
    """The outputs of a forward that hold tensors with dimensions, with their kind, None if unknown.

    Args:
        output: a ``ModelOutput``.
    """
    for key, value in output.items():
        parts = value if isinstance(value, tuple) else (value,)
        if not is_cache(value) and any(isinstance(x, torch.Tensor) and x.ndim for x in parts):
            yield key, OUTPUTS.get(key), value
