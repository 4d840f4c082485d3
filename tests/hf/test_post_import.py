from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from axattn.hf import post_import
from axattn.hf.post_import import after_import

Make = Callable[..., None]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Writes a module of one's own; afterwards nothing of it is left, and what waited before waits again."""
    monkeypatch.setattr(post_import, "_waiting", {})
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not post_import._finder])
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, text: str = "value = 1\n") -> None:
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_runs_once_the_module_is_there_and_nothing_stays_behind(make: Make) -> None:
    make("late")
    finders, seen = list(sys.meta_path), []
    after_import("late", lambda: seen.append(sys.modules["late"].value))
    assert importlib.util.find_spec("late") is not None  # somebody looks for it, and does not import it
    assert seen == []
    late = importlib.import_module("late")
    assert seen == [1]
    assert sys.meta_path == finders
    assert type(late.__spec__) is type(importlib.util.__spec__)
    assert "exec_module" not in vars(late.__spec__.loader)
    importlib.reload(late)
    assert seen == [1]


def test_for_an_imported_module_the_function_runs_at_once(make: Make) -> None:
    make("late")
    importlib.import_module("late")
    finders, seen = list(sys.meta_path), []
    after_import("late", lambda: seen.append(1))
    assert seen == [1]
    assert sys.meta_path == finders


def test_many_functions_run_in_order_and_one_that_fails_breaks_neither_the_import_nor_the_others(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    make("late")
    seen: list[int] = []
    after_import("late", lambda: seen.append(1))
    after_import("late", lambda: 1 / 0)
    after_import("late", lambda: after_import("late", lambda: seen.append(2)))
    after_import("late", lambda: seen.append(3))
    with caplog.at_level(logging.WARNING, "axattn"):
        assert importlib.import_module("late").value == 1
    assert seen == [1, 2, 3]
    assert "for the import of late failed: ZeroDivisionError" in caplog.text


def test_a_function_that_comes_in_the_middle_of_the_import_runs_at_its_end(make: Make) -> None:
    make("helper", "import sys\nfrom axattn.hf.post_import import after_import\nseen = []\n"
         "after_import('late', lambda: seen.append(vars(sys.modules['late']).get('value')))\n")  # fmt: skip
    make("late", "import helper\nassert not helper.seen\nvalue = 1\n")
    late = importlib.import_module("late")
    assert late.helper.seen == [1]
    assert type(late.__spec__) is type(importlib.util.__spec__)


def test_a_function_that_comes_while_another_thread_imports_runs_there_at_the_end(make: Make) -> None:
    gate: Any = types.ModuleType("gate")
    gate.reached, gate.open = threading.Event(), threading.Event()
    sys.modules["gate"] = gate
    make("late", "import gate\ngate.reached.set()\nassert gate.open.wait(60)\nvalue = 1\n")
    seen: list[int] = []
    importer = threading.Thread(target=importlib.import_module, args=("late",))
    importer.start()
    assert gate.reached.wait(60)
    after_import("late", lambda: seen.append(threading.get_ident()))
    assert seen == []
    gate.open.set()
    importer.join()
    assert seen == [importer.ident]


@pytest.mark.parametrize("middle", [False, True], ids=["before", "in the middle"])
def test_an_import_that_fails_raises_its_own_error_and_can_be_repeated(make: Make, middle: bool) -> None:
    hook = (
        "import builtins\nfrom axattn.hf.post_import import after_import\nafter_import('late', builtins.axattn_seen)\n"
    )
    seen: list[int] = []
    make("late", (hook if middle else "") + "1 / 0\n")
    sys.modules["builtins"].axattn_seen = lambda: seen.append(1)  # type: ignore[attr-defined]
    try:
        if not middle:
            after_import("late", lambda: seen.append(1))
        with pytest.raises(ZeroDivisionError):
            importlib.import_module("late")
        assert seen == []
        make("late", "value = 22  # another size, so that the cached byte code is stale\n")
        assert importlib.import_module("late").value == 22
        assert seen == [1]
    finally:
        del sys.modules["builtins"].axattn_seen  # type: ignore[attr-defined]


class Wrapping:
    """Another package's hook: a finder that wraps the loader's ``exec_module`` and takes itself out."""

    def __init__(self, when: str, seen: list[str]) -> None:
        self.when, self.seen, self.busy = when, seen, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "late" or self.busy:
            return None
        self.busy = True
        spec = importlib.util.find_spec(name)
        self.busy = False
        assert spec is not None
        loader: Any = spec.loader
        execute, own = loader.exec_module, vars(loader).get("exec_module")

        def leave() -> None:
            if own is None:
                del loader.exec_module
            else:
                loader.exec_module = own
            sys.meta_path.remove(self)

        def exec_module(module: types.ModuleType) -> None:
            if self.when == "first":
                leave()
            execute(module)
            self.seen.append(self.when)
            if self.when == "last":
                leave()

        loader.exec_module = exec_module
        return spec


@pytest.mark.parametrize("when", ["first", "last", "never"])
@pytest.mark.parametrize("order", ["axattn first", "the other first", "between"])
def test_beside_another_packages_hook_both_run_and_theirs_survives(make: Make, when: str, order: str) -> None:
    make("late")
    seen: list[str] = []
    other = Wrapping(when, seen)
    if order != "the other first":
        after_import("late", lambda: seen.append("axattn"))
    sys.meta_path.insert(0, other)
    if order != "axattn first":
        after_import("late", lambda: seen.append("axattn"))
    late = importlib.import_module("late")
    assert seen == [when, *["axattn"] * (2 if order == "between" else 1)]
    assert ("exec_module" in vars(late.__spec__.loader)) == (when == "never")


def test_a_spec_that_cant_be_watched_is_reported_and_imported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            found = None if name != "late" else importlib.machinery.PathFinder.find_spec(name)
            if found is None:
                return None
            whole = {"parent": "", "has_location": True, "cached": None, "submodule_search_locations": None}
            return types.SimpleNamespace(**{**vars(found), **whole})

    make("late")
    sys.meta_path.insert(0, Odd())  # type: ignore[arg-type]
    after_import("late", lambda: None)
    with caplog.at_level(logging.WARNING, "axattn"):
        assert importlib.import_module("late").value == 1
    assert "can't detect the end of the import of late" in caplog.text
