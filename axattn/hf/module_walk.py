"""The modules of a model, walked once (inside `one_walk` all callers get the same tuple), and their attributes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

Named = tuple[tuple[str, torch.nn.Module], ...]

_walks: ContextVar[dict[int, tuple[torch.nn.Module, Named]] | None] = ContextVar("walks", default=None)


@contextlib.contextmanager
def one_walk() -> Iterator[None]:
    """Context in which no module is added to a model or removed from it."""
    token = _walks.set({}) if _walks.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _walks.reset(token)


def named_modules(model: torch.nn.Module) -> Named:
    """``model.named_modules()``, as a tuple."""
    walks = _walks.get()
    if walks is None:
        return tuple(model.named_modules())
    if id(model) not in walks:
        walks[id(model)] = (model, tuple(model.named_modules()))
    return walks[id(model)][1]


def modules_of(model: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """``model.modules()``, as a tuple."""
    return tuple(module for _, module in named_modules(model))


def attribute(module: torch.nn.Module, name: str, default: Any = None) -> Any:
    """``getattr(module, name, default)``, for an attribute that most modules lack: torch builds an error text for each
    of those, which takes longer than the rest of a walk."""
    cls = type(module)
    if name in vars(module) or hasattr(cls, name) or cls.__getattr__ is not torch.nn.Module.__getattr__:
        return getattr(module, name, default)
    held = next((kind for kind in (module._parameters, module._buffers, module._modules) if name in kind), None)
    return default if held is None else held[name]
