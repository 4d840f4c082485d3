"""Copies a loaded model for verification: unpatched and without dropout. The model itself is not changed."""

from __future__ import annotations

import copy
from typing import Any

import torch

from axattn import loading
from axattn.patches.state import transformers_model


def copied(model: torch.nn.Module) -> Any:
    """The copy; if `model` is a wrapper (PEFT), of the inner Transformers model.

    Raises:
        TypeError: there is no Transformers model in it.
    """
    duplicate: Any = loading.restore(copy.deepcopy(transformers_model(model)))
    for module in duplicate.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # attention modules store their own rate
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return duplicate
