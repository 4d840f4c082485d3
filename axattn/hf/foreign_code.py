"""Whose code stands in the place of a module's ``forward`` or among its hooks: told by the packages it is from."""

from __future__ import annotations

import functools
import sys
from typing import Any

from axattn.hf.module_walk import named_modules
from axattn.hf.source_inspection import origin
from axattn.hf.torch_internals import calls_around, hooks_of, pre_hooks

_HAND_ON = frozenset({"accelerate", "axattn", "deepspeed", "liger_kernel", "peft", "torch", "transformers", "trl"})
"""Packages whose hooks and wrappers hand positions, lengths and masks on as they came."""


def packages_of(function: Any) -> frozenset[str]:
    """The packages that a function, and what it says it wraps, are from.

    Read by the globals of its code: ``functools.wraps`` copies ``__module__``, and TRL's ``forward`` then says that it
    is Transformers'. A wrapper that keeps what it wraps in a closure alone hides it.
    """
    found: set[str] = set()
    seen: set[int] = set()
    left = [function]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            left.append(one.func)
        elif hasattr(one, "__func__"):
            left.append(one.__func__)
        else:
            where = getattr(one, "__globals__", None)
            name = type(one).__module__ if where is None else where.get("__name__", "")
            found.add(str(name).partition(".")[0])
            left.append(vars(one).get("inner") if where is None and hasattr(one, "__dict__") else None)
        left.append(getattr(one, "__wrapped__", None))
    return frozenset(found)


def changes_inputs(module: Any, hook: Any) -> bool:
    """Whether code from a package that is not known runs between a forward pre-hook of a module and its ``forward``:
    hooks behind it, a ``forward`` in the place of the class's, a subclass that adds to it."""
    cls: Any = type(module)
    hooks = pre_hooks(module)
    at = next((at for at, one in enumerate(hooks) if one == hook), -1)
    between = [*hooks[at + 1 :], vars(module).get("forward")]
    if cls.forward is not origin(cls).forward:
        between.append(cls.forward)
    return any(not packages_of(one) <= _HAND_ON for one in between)


def foreign_hooks(model: Any) -> list[str]:
    """The modules inside of a model that have hooks from packages that are not known."""
    some = [(name, hooks_of(module)) for name, module in named_modules(model) if name]
    return [name for name, hooks in some if any(not packages_of(hook) <= _HAND_ON for hook in hooks)]


_PER_SAMPLE = "autograd_grad_sample_hooks"
"""The attribute in which Opacus keeps its hooks on the module that it was given (opacus 1.6)."""


def takes_gradients_by_row(module: Any) -> bool:
    """Whether the call of a module runs under Opacus' hooks, which take a gradient for each index of dim 0."""
    if "opacus" not in sys.modules:
        return False
    modules = [module, *(around for around, _, _ in calls_around(module)[1])]
    return any(_PER_SAMPLE in vars(one) for one in modules)
