"""Runs a function right after a module's first import. Imports nothing but the standard library's import machinery.

wrapt has the same (``register_post_import_hook``), but importing wrapt 2.5 costs 58 ms, since it brings asyncio along:
more than a tenth of ``import transformers``, and all of the budget that ``import axattn`` has.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def is_imported(name: str) -> bool:
    """Whether a module is imported to the end (and not in the middle of it)."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def after_import(name: str, function: Callable[[], None]) -> None:
    """Call `function` once: now if the module `name` is imported, else as soon as its first import has succeeded."""
    if is_imported(name):
        function()
    else:
        sys.meta_path.insert(0, _Watcher(name, function))


class _Watcher:
    """A meta path finder that lets the others find the module, and takes itself out once the module is executed."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name = name
        self.function = function
        self.busy = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with the loader set to call us back."""
        if name != self.name or self.busy:
            return None
        self.busy = True
        try:
            spec = None
            for finder in sys.meta_path:
                if finder is not self and hasattr(finder, "find_spec"):
                    spec = finder.find_spec(name, path, target)
                    if spec is not None:
                        break
        finally:
            self.busy = False
        loader = None if spec is None else spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the instance attribute set below: the loader is as it was
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.function()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
