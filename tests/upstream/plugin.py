"""A pytest plugin: every model that a test builds runs on `auto`, and what became of each test goes to a file.

``AXATTN_UPSTREAM_ON`` is ``auto``, or ``stock``: models stay as Transformers makes them. `auto` stands for ``sdpa``
where a test names that (most compare it with eager); models for which it names any other (in an argument, in the
config) stay on that. Outcomes are written to ``AXATTN_UPSTREAM_OUTCOMES``.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import axattn
from axattn.spec import names
from tests.upstream import outcomes
from tests.upstream.sources import PACKAGE

_RANK = {"skipped": 0, "passed": 1, "failed": 2}
_results: dict[str, outcomes.Outcome] = {}


class _Building:
    """The model that is being built or loaded; those inside of it are not put on `auto` by themselves."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.reset_model()
        self.on_auto = False
        self.loading = 0
        self.placed = 0

    def reset_model(self) -> None:
        self.outermost: Callable[[], Any] = lambda: None


_now = _Building()


def _runs_on_auto(config: Any) -> bool:
    """Whether a model is to run on `auto`: nobody has named another attention than ``sdpa`` for it, or for a part."""
    name = getattr(config, "_attn_implementation", None)
    if name is not None:
        return _stands_for_auto(name)
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    return all(part is None or _runs_on_auto(part) for part in parts)


def _stands_for_auto(name: Any) -> bool:
    return isinstance(name, str) and (name == "sdpa" or not names.is_native(name))


def _place(model: Any) -> None:
    _now.loading += 1  # models that axattn builds to try something are its own
    try:
        axattn.apply(model, "auto")
    finally:
        _now.loading -= 1
    _now.placed += 1


def put_models_on_auto() -> None:
    from transformers import PreTrainedModel

    init, post_init = PreTrainedModel.__init__, PreTrainedModel.post_init
    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(init)
    def before(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if _now.outermost() is None and not _now.loading:
            _now.outermost, _now.on_auto = weakref.ref(self), _runs_on_auto(config)  # one whose building fails is gone
        init(self, config, *args, **kwargs)

    @functools.wraps(post_init)
    def after(self: Any) -> None:
        post_init(self)
        if _now.outermost() is self:
            _now.reset_model()
            if _now.on_auto:
                _place(self)

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("attn_implementation")
        on_auto = _runs_on_auto(kwargs.get("config")) if asked is None else _stands_for_auto(asked)
        on_auto = on_auto and not _now.loading
        _now.loading += 1
        try:
            loaded = load(cls, *args, **kwargs)
        finally:
            _now.loading -= 1
        if on_auto:
            _place(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    PreTrainedModel.__init__, PreTrainedModel.post_init = before, after
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def pytest_configure() -> None:
    if os.environ["AXATTN_UPSTREAM_ON"] == "auto":
        put_models_on_auto()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _now.reset()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    mixins: Any = sys.modules[f"{PACKAGE}.test_modeling_common"]
    mixins.global_rng.seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    test = "::".join(item.nodeid.split("::")[1:])
    if report.when == "call" or report.outcome != "passed":
        found = outcomes.Outcome(test, report.outcome, *described(call.excinfo), _now.placed)
        before = _results.get(test)  # one of its subtests
        if before is None or _RANK[found.result] > _RANK[before.result]:
            _results[test] = found
    return report


def described(failure: pytest.ExceptionInfo[BaseException] | None) -> tuple[bool, str]:
    """Whether a failure comes from an `AxattnError`, and what it says: its causes, and where."""
    if failure is None:
        return False, ""
    errors = list(_chain(failure.value))
    said = " <- ".join(f"{type(error).__name__}: {error}"[:1500] for error in errors[:3])
    places = " > ".join(f"{Path(entry.path).name}:{entry.lineno + 1}" for entry in failure.traceback[-4:])
    return any(isinstance(error, axattn.AxattnError) for error in errors), f"{said} (at {places})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def pytest_sessionfinish() -> None:
    Path(os.environ["AXATTN_UPSTREAM_OUTCOMES"]).write_text(outcomes.write(_results.values()))
