"""Which parts of a model draw random numbers per token in training."""

from __future__ import annotations

import torch

from axattn.errors import Reason

_RANDOM = ("dropout", "layerdrop", "drop_path", "jitter", "noise")
"""Parts of the names of attributes that hold a probability or a scale: ``attention_dropout``, ``router_jitter_noise``,
``neftune_noise_alpha``."""


def random_parts(model: torch.nn.Module) -> list[Reason]:
    """Every kind of random number that a model draws per token: where several documents share a token, they would share
    its draw. The first module of each kind is named."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            if module.p > 0 and module.training:
                found.setdefault("dropout", f"{path} drops values with probability {module.p}")
            continue
        for name, value in vars(module).items():
            if isinstance(value, float | int) and not isinstance(value, bool) and value > 0:
                kind = next((one for one in _RANDOM if one in name), None)
                if kind is not None and module.training:
                    found.setdefault(kind, f"{path}.{name} is {value}")
    return [Reason("dropout", f"one draw would serve several documents: {text}") for text in found.values()]
