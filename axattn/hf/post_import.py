"""Runs functions right after a module's first import. Imports only the standard library's import machinery.

wrapt has the same (``register_post_import_hook``), but importing wrapt 2.5 takes 58 ms because it imports asyncio: more
than a tenth of ``import transformers``, and the whole budget of ``import axattn``. It also calls the function at once
in the middle of an import.

The end of an import is detected on the module's spec: importlib sets ``_initializing`` to False there, whoever wraps
the loader's ``exec_module`` and in whatever order the wrappers are removed. Loaders, which modules may share, are not
changed.
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
    """Whether the import of a module is complete."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def after_import(name: str, function: Callable[[], object]) -> None:
    """Call a function once: now if the module `name` is imported, else as soon as its import succeeds.

    Functions for the same module are called in order of registration. Their exceptions are logged as warnings, so that
    they never break an import of the user's.
    """
    _waiting.setdefault(name, []).append(function)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    spec: Any = getattr(sys.modules.get(name), "__spec__", None)
    if getattr(spec, "_initializing", False):  # too late for the finder
        _watch(spec)
    if is_imported(name):  # earlier, or by another thread just now
        _call(name)


def _call(name: str) -> None:
    for function in _waiting.pop(name, ()):
        try:
            function()
        except Exception as error:
            _warn(f"a function registered for the import of {name} failed: {type(error).__name__}: {error}")
    if not _waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _warn(text: str) -> None:
    import logging

    logging.getLogger("axattn").warning("axattn: %s", text)


def _watch(spec: ModuleSpec) -> None:
    """Change the class of a spec until its module is imported, or its import fails."""
    kind = type(spec)
    if kind.__setattr__ is not _set:
        try:
            spec.__class__ = type(kind.__name__, (kind,), {"__setattr__": _set, "__slots__": ()})
        except TypeError as error:  # not a Python class: a spec of a custom finder
            _warn(f"can't detect the end of the import of {spec.name}: {error}")


def _set(spec: Any, attribute: str, value: Any) -> None:
    kind: Any = type(spec).__base__
    kind.__setattr__(spec, attribute, value)
    if attribute == "_initializing" and not value:
        spec.__class__ = kind
        if is_imported(spec.name):  # importlib removes a module whose import fails
            _call(spec.name)


class _Finder:
    """A meta path finder that delegates to the other finders and watches the specs of awaited modules."""

    def __init__(self) -> None:
        self.asking: set[tuple[int, str]] = set()  # by thread: another may look for the same module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec from the other finders, watched."""
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
