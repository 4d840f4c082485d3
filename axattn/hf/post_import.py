"""Runs functions right after a module's first import. Imports nothing but the standard library's import machinery.

wrapt has the same (``register_post_import_hook``), but importing wrapt 2.5 costs 58 ms, since it brings asyncio along:
more than a tenth of ``import transformers``, and all of the budget that ``import axattn`` has. It also calls at once in
the middle of an import.

The end of an import is seen on the module's spec: importlib sets ``_initializing`` to False there, whoever wraps the
loader's ``exec_module`` and in whatever order they take themselves out. Loaders, which modules may share, stay as they
are.
"""

from __future__ import annotations

import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_waiting: dict[str, list[Callable[[], object]]] = {}


def is_imported(name: str) -> bool:
    """Whether a module is imported to the end (and not in the middle of it)."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def after_import(name: str, function: Callable[[], object]) -> None:
    """Call a function once: now if the module `name` is imported, else as soon as an import of it has succeeded.

    Functions for the same module are called in the order they came. What one raises is logged as a warning: it must not
    break the import of a module that somebody else asked for.
    """
    _waiting.setdefault(name, []).append(function)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    spec: Any = getattr(sys.modules.get(name), "__spec__", None)
    if getattr(spec, "_initializing", False):  # too late for the finder
        _watch(spec)
    if is_imported(name):  # from before, or another thread has just finished it
        _call(name)


def _call(name: str) -> None:
    for function in _waiting.pop(name, ()):
        try:
            function()
        except Exception as error:
            _warn(f"what was to run after the import of {name} failed: {type(error).__name__}: {error}")
    if not _waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _warn(text: str) -> None:
    import logging

    logging.getLogger("axattn").warning("axattn: %s", text)


def _watch(spec: ModuleSpec) -> None:
    """Give a spec a class of its own until its module is imported, or its import has failed."""
    kind = type(spec)
    if kind.__setattr__ is not _set:
        try:
            spec.__class__ = type(kind.__name__, (kind,), {"__setattr__": _set, "__slots__": ()})
        except TypeError as error:  # no Python class: somebody's own finder
            _warn(f"can't tell when the import of {spec.name} ends: {error}")


def _set(spec: Any, attribute: str, value: Any) -> None:
    kind: Any = type(spec).__base__
    kind.__setattr__(spec, attribute, value)
    if attribute == "_initializing" and not value:
        spec.__class__ = kind
        if is_imported(spec.name):  # importlib has taken the module out if it failed
            _call(spec.name)


class _Finder:
    """A meta path finder that lets the others find the modules that are waited for, and watches their specs."""

    def __init__(self) -> None:
        self.asking: set[tuple[int, str]] = set()  # by thread: others may look for the same module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, watched."""
        asking = (threading.get_ident(), name)
        spec = None
        if name not in _waiting or asking in self.asking:
            return None
        self.asking.add(asking)
        try:
            for finder in list(sys.meta_path):
                if finder is not self and hasattr(finder, "find_spec"):
                    spec = finder.find_spec(name, path, target)
                if spec is not None:
                    _watch(spec)
                    return spec
        finally:
            self.asking.discard(asking)
        return None


_finder = _Finder()
