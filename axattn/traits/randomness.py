"""Which parts of a model draw random numbers per token in training."""

from __future__ import annotations

from typing import Any

import torch

from axattn.errors import Reason

_RANDOM = ("dropout", "layerdrop", "drop_path", "jitter", "noise")
"""Parts of the names of attributes that hold a probability or a scale: ``attention_dropout``, ``router_jitter_noise``,
``neftune_noise_alpha``."""
_DROPOUT = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)


def random_parts(model: torch.nn.Module) -> list[Reason]:
    """Every kind of random number that a model draws per token: where several documents share a token, they would share
    its draw. The first module of each kind is named. Persimmon's attention reads its probability in the config."""
    found: dict[str, str] = {}
    config: Any = getattr(model, "config", None)
    values = {name: value for name, value in getattr(config, "__dict__", {}).items() if "classifier" not in name}
    _add(found, "config", values)
    for path, module in model.named_modules():
        if isinstance(module, _DROPOUT):
            if module.p > 0 and module.training:
                found.setdefault("dropout", f"{path} drops values with probability {module.p}")
        elif module.training:
            _add(found, path, vars(module))
    return [Reason("dropout", f"one draw would serve several documents: {text}") for text in found.values()]


def _add(found: dict[str, str], owner: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float | int) and not isinstance(value, bool) and value > 0:
            kind = next((one for one in _RANDOM if one in name), None)
            if kind is not None:
                found.setdefault(kind, f"{owner}.{name} is {value}")
