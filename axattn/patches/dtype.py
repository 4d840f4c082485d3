"""Patch: cast stray fp32 embeddings and norms to the dtype of the model's other weights.

k-bit preparation (PEFT) and some checkpoints leave norms and embeddings in fp32, so that q and k reach a 16-bit kernel
as fp32. Undo restores the dtype, not the bits lost to rounding.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from axattn.patches.patchset import PatchSet

_HALVES = (torch.float16, torch.bfloat16)


def compute_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The 16-bit dtype of most of the model's weights (for quantised layers, their compute dtype), else None."""
    weight: Counter[torch.dtype] = Counter()
    for module in model.modules():
        quantised = getattr(module, "compute_dtype", None)  # bitsandbytes linears: their weights are integers
        for parameter in module.parameters(recurse=False):
            if not parameter.is_floating_point():
                if isinstance(quantised, torch.dtype):
                    weight[quantised] += parameter.numel()
            else:
                weight[parameter.dtype] += parameter.numel()
    if not weight:
        return None
    halves = [dtype for dtype in weight if dtype in _HALVES]
    if not halves:
        return None
    rest = Counter({d: n for d, n in weight.items() if d in _HALVES})
    return rest.most_common(1)[0][0]


def cast_stray_weights(patches: PatchSet, model: torch.nn.Module) -> list[str]:
    """Cast fp32 embeddings (the output's too, as its input comes from the last norm) and norms to `compute_dtype`.

    An fp32 model is not changed. Returns the names cast.
    """
    dtype = compute_dtype(model)
    if dtype is None:
        return []
    cast = []
    models: list[Any] = [m for m in model.modules() if hasattr(m, "get_output_embeddings")]
    heads = [one.get_output_embeddings() for one in models]
    for name, module in model.named_modules():
        head = any(module is one for one in heads)
        if not (isinstance(module, torch.nn.Embedding) or head or _is_norm(module)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.float32:
                patches.add_undo(_set_dtype, parameter, torch.float32)
                _set_dtype(parameter, dtype)
                cast.append(f"{name}.{key}")
    return cast


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _set_dtype(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    parameter.data = parameter.data.to(dtype)
    if parameter.grad is not None:
        parameter.grad = parameter.grad.to(dtype)
