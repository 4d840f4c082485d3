"""Finds code of other packages in the hooks of a module or in place of its ``forward``."""

from __future__ import annotations

import functools
import sys
from typing import Any

from axattn.hf.module_walk import named_modules
from axattn.hf.source_inspection import origin
from axattn.hf.torch_internals import calls_around, hooks_of, pre_hooks

_PASS_INPUTS_ON = frozenset(
    {"accelerate", "axattn", "deepspeed", "liger_kernel", "peft", "torch", "transformers", "trl"}
)
"""Packages whose hooks and wrappers pass positions, lengths and masks through unchanged."""


def packages_of(function: Any) -> frozenset[str]:
    """The packages of a function and of the functions that it wraps.

    Read from the globals of the code: ``functools.wraps`` copies ``__module__``, so that TRL's ``forward`` claims to be
    Transformers'. A function that is wrapped by a closure only is not found.
    """
    found: set[str] = set()
    visited: set[int] = set()
    todo = [function]
    while todo:
        one = todo.pop()
        if one is None or id(one) in visited:
            continue
        visited.add(id(one))
        if isinstance(one, functools.partial):
            todo.append(one.func)
        elif hasattr(one, "__func__"):
            todo.append(one.__func__)
        else:
            module_globals = getattr(one, "__globals__", None)
            name = type(one).__module__ if module_globals is None else module_globals.get("__name__", "")
            found.add(str(name).partition(".")[0])
            todo.append(vars(one).get("inner") if module_globals is None and hasattr(one, "__dict__") else None)
        todo.append(getattr(one, "__wrapped__", None))
    return frozenset(found)


def changes_inputs(module: Any, hook: Any) -> bool:
    """Whether code of an unknown package runs between a forward pre-hook of a module and its ``forward``: later hooks,
    a replaced ``forward``, a subclass that extends it."""
    cls: Any = type(module)
    hooks = pre_hooks(module)
    at = next((at for at, one in enumerate(hooks) if one == hook), -1)
    between = [*hooks[at + 1 :], vars(module).get("forward")]
    if cls.forward is not origin(cls).forward:
        between.append(cls.forward)
    return any(not packages_of(one) <= _PASS_INPUTS_ON for one in between)


def foreign_hooks(model: Any) -> list[str]:
    """The inner modules of a model that have hooks of unknown packages."""
    by_module = [(name, hooks_of(module)) for name, module in named_modules(model) if name]
    return [name for name, hooks in by_module if any(not packages_of(hook) <= _PASS_INPUTS_ON for hook in hooks)]


_PER_SAMPLE = "autograd_grad_sample_hooks"
"""The attribute in which Opacus stores its hooks, on the wrapped module (opacus 1.6)."""


def takes_gradients_by_row(module: Any) -> bool:
    """Whether a module runs under Opacus' hooks, which compute a gradient for each index of dim 0."""
    if "opacus" not in sys.modules:
        return False
    modules = [module, *(around for around, _, _ in calls_around(module)[1])]
    return any(_PER_SAMPLE in vars(one) for one in modules)
