"""What axattn takes from PEFT, accelerate and torchao by private names, each in one function. No decisions here."""

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
    """What PEFT's hooks hand to the layers of an adapter in this forward, by keyword (peft 0.21).

    It puts the same hooks on all of them, for one forward: the first layer tells.
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
    """Whether a function of PEFT leads to this call: only inside of its own do its hooks exist. Looking for adapters in
    every module of a model costs more than the frames do."""
    if _TUNERS not in sys.modules:
        return False
    frame = inspect.currentframe()
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("peft."):
        frame = frame.f_back
    return frame is not None


ORIGINAL = ".original_module"
"""How the name of a module ends of which PEFT's ``modules_to_save`` trains and runs a copy beside it (peft 0.21)."""
CONTEXT_PARALLEL_HOOK = "_attach_context_parallel_hooks"
"""The function of accelerate that makes the hooks which `removes_masks` knows."""


def removes_masks(hook: Any) -> bool:
    """Whether a forward pre-hook is one by which ``Accelerator.prepare`` takes masks away (accelerate 1.15)."""
    return CONTEXT_PARALLEL_HOOK in getattr(hook, "__qualname__", "")


def fp8_quantiser() -> Callable[..., Any]:
    """torchao's quantiser of whole rows: ``(q, k, v)``, each ``[B, H, S, D]``, to fp8, and the scales that undo it
    (torchao 0.17 and 0.18)."""
    found: Callable[..., Any] = importlib.import_module("torchao.prototype.attention.quantization")._fp8_sdpa_quantize
    return found
