"""Faults put in on purpose: the registry of all of them, each with what must turn red. No test lives here.

`tests/mutations.md` lists them (``python -m tests.mutations``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

Patch = pytest.MonkeyPatch
Inject = Callable[[Patch], None]


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: what is wrong, as a sentence.
        inject: puts it in.
        red: the cell or the checks that must turn red.
        test: the file whose test shows it.
    """

    name: str
    inject: Inject
    red: str
    test: str

    def changes(self) -> list[str]:
        """What it replaces, by dotted names: seen by putting it in."""
        recorder = _Recorder()
        try:
            self.inject(recorder)
        finally:
            recorder.undo()
        return recorder.changed


FAULTS: dict[str, Fault] = {}


def fault(red: str) -> Callable[[Inject], Inject]:
    """Register a function that puts a fault in, and what must turn red. Its name is the fault's.

    Raises:
        ValueError: there is one of this name.
    """

    def add(inject: Inject) -> Inject:
        name = inject.__name__.strip("_").replace("_", " ")
        if name in FAULTS and FAULTS[name].test != inject.__module__.replace(".", "/") + ".py":
            raise ValueError(f"two faults are called {name!r}")
        FAULTS[name] = Fault(name, inject, red, inject.__module__.replace(".", "/") + ".py")
        return inject

    return add


class _Recorder(pytest.MonkeyPatch):
    """A patch that remembers what it replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[str] = []

    def setattr(self, target: Any, name: Any, *rest: Any, **options: Any) -> None:
        """As pytest's."""
        if isinstance(target, str):
            shown = target
        else:
            owner = target.__name__ if inspect.ismodule(target) else f"{target.__module__}.{target.__qualname__}"
            shown = f"{owner}.{name}"
        if shown not in self.changed:
            self.changed.append(shown)
        super().setattr(target, name, *rest, **options)
