"""Whose code stands in the place of a module's ``forward`` or among its hooks: told by the packages it is from."""

from __future__ import annotations

import functools
from typing import Any

from axattn.hf.source_inspection import origin
from axattn.hf.torch_internals import pre_hooks

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
