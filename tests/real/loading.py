"""Imports a library of `tests.real.packages` on a CPU and leaves no trace of it in ``sys.path`` and ``sys.modules``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.real.packages import folder


@contextlib.contextmanager
def on_cpu(*packages: str, stand_ins: Mapping[str, ModuleType] | None = None) -> Iterator[None]:
    """Import from these packages, over modules that stand in for compiled ones; operators are made for any device."""
    real, before = torch.library.custom_op, set(sys.modules)

    def custom_op(name: str, *args: Any, device_types: Any = None, **kwargs: Any) -> Any:
        return real(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.library, "custom_op", custom_op)
        patch.setattr(sys, "path", [*map(str, map(folder, packages)), *sys.path])
        for name, module in (stand_ins or {}).items():
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

    with on_cpu("flash-attn", "einops", stand_ins={"flash_attn_2_cuda": flash_attn_2_cuda}):
        package = importlib.import_module("flash_attn")
        importlib.import_module("flash_attn.bert_padding")
        return package


@functools.cache
def fa3_fwd() -> Any:
    """``fa3_fwd_interface`` of fa3-fwd 0.0.3, its operator by `tests.real.fa3_fwd_operator`."""
    from tests.real import fa3_fwd_operator

    package = ModuleType("fa3_fwd")
    package._C = ModuleType("fa3_fwd._C")  # type: ignore[attr-defined]
    with on_cpu("fa3-fwd", stand_ins={"fa3_fwd": package, "fa3_fwd._C": package._C}):
        flags = importlib.import_module("fa3_fwd_config").CONFIG["build_flags"]
        fa3_fwd_operator.register(flags)
        return importlib.import_module("fa3_fwd_interface")
