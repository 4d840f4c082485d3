"""Private names of PEFT, accelerate and torchao that axattn uses, each in one place. No decisions here."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from axattn.hf.torch_internals import pre_hooks

_TUNERS = "peft.tuners.tuners_utils"


def adapter_keywords(model: torch.nn.Module) -> dict[str, Any]:
    """The keywords that PEFT's hooks pass to the layers of an adapter in this forward (peft 0.21).

    All layers get the same hooks for one forward, so only the first layer is read.
    """
    if not adapters_run():
        return {}
    tuners = sys.modules[_TUNERS]
    layer = next((module for module in model.modules() if isinstance(module, tuners.BaseTunerLayer)), None)
    found: dict[str, Any] = {}
    for hook in () if layer is None else pre_hooks(layer):
        if isinstance(hook, functools.partial):
            found |= hook.keywords
        elif inspect.isfunction(hook):
            found |= inspect.getclosurevars(hook).nonlocals
    return found


def adapters_run() -> bool:
    """Whether PEFT is among the callers; its hooks exist only then. Searching every module of a model for adapters
    costs more than walking the frames."""
    if _TUNERS not in sys.modules:
        return False
    frame = inspect.currentframe()
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("peft."):
        frame = frame.f_back
    return frame is not None


ORIGINAL = ".original_module"
"""Suffix of the name of a module that PEFT's ``modules_to_save`` replaces by a trained copy (peft 0.21)."""
CONTEXT_PARALLEL_HOOK = "_attach_context_parallel_hooks"
"""The function of accelerate that creates the hooks which `removes_masks` recognises."""


def removes_masks(hook: Any) -> bool:
    """Whether a forward pre-hook is the one with which ``Accelerator.prepare`` drops masks (accelerate 1.15)."""
    return CONTEXT_PARALLEL_HOOK in getattr(hook, "__qualname__", "")


def fp8_quantiser() -> Callable[..., Any]:
    """torchao's quantiser of whole rows: ``(q, k, v)``, each ``[B, H, S, D]``, to fp8 and dequantisation scales
    (torchao 0.17 and 0.18)."""
    found: Callable[..., Any] = importlib.import_module("torchao.prototype.attention.quantization")._fp8_sdpa_quantize
    return found
