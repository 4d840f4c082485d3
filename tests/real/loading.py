"""Imports a library of `tests.real.packages` on a CPU and leaves no trace of it in ``sys.path`` and ``sys.modules``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.real.packages import folder


@contextlib.contextmanager
def on_cpu(*packages: str, **stand_ins: ModuleType) -> Iterator[None]:
    """Import from these packages, over modules that stand in for compiled ones; operators are made for any device."""
    real, before = torch.library.custom_op, set(sys.modules)

    def custom_op(name: str, *args: Any, device_types: Any = None, **kwargs: Any) -> Any:
        return real(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.library, "custom_op", custom_op)
        patch.setattr(sys, "path", [*map(str, map(folder, packages)), *sys.path])
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        try:
            yield
        finally:
            roots = {path.name.split(".")[0] for package in packages for path in folder(package).iterdir()}
            for name in set(sys.modules) - before:
                if name.split(".")[0] in roots:
                    del sys.modules[name]


@functools.cache
def flash_attn() -> Any:
    """flash-attn 2.8.3, its kernels by `tests.real.flash_attn_2_cuda`; with its module ``bert_padding``."""
    from tests.real import flash_attn_2_cuda

    with on_cpu("flash-attn", "einops", flash_attn_2_cuda=flash_attn_2_cuda):
        package = importlib.import_module("flash_attn")
        importlib.import_module("flash_attn.bert_padding")
        return package
