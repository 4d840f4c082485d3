"""`weak_cache`: caches results about a class or a function for as long as it lives.

``functools.cache`` would keep every inspected class alive; trials, FSDP2 and PEFT create classes at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

_Function = TypeVar("_Function", bound=Callable[..., Any])


def weak_cache(function: _Function) -> _Function:
    """Like ``functools.cache``, but the first argument is not kept alive.

    Args:
        function: takes positional arguments: a class or a function, then values (names, numbers). Its result must not
            refer to the first argument, or that stays alive.
    """
    results: WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()

    @functools.wraps(function)
    def cached(first: Any, *others: Any) -> Any:
        try:
            known = results.setdefault(first, {})
        except TypeError:  # a callable without weak references
            return function(first, *others)
        if others not in known:
            known[others] = function(first, *others)
        return known[others]

    return cached  # type: ignore[return-value]  # the same signature
