"""A copy of a live model to try kernels on: unpatched, without dropout, the model itself untouched."""

from __future__ import annotations

import copy
from typing import Any

import torch

from axattn import loading
from axattn.patches.state import transformers_model


def copied(model: torch.nn.Module) -> Any:
    """The copy; of the Transformers model inside when `model` wraps one (PEFT).

    Raises:
        TypeError: there is no Transformers model in it.
    """
    made: Any = loading.restore(copy.deepcopy(transformers_model(model)))
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # attention modules keep their own rate
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return made
