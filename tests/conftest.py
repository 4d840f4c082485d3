"""Shared fixtures. GPU tests are skipped with the reason where there is no GPU."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from tests import interpreter
from tests.pretend import machine

torch.set_num_threads(1)
# with `gc.freeze` below a third less time: what torch and Transformers leave behind is a million objects
gc.set_threshold(50_000, 20, 50)
interpreter.choose()
collect_ignore = [] if machine.loaded() or machine.WHY_NOT else ["pretend"]  # `make pretend`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if machine.WHY_NOT and item.path.parent.name == "pretend":
            item.add_marker(pytest.mark.skip(reason=machine.WHY_NOT))
    if torch.cuda.is_available() or "AXATTN_GPU_TESTS_ON" in os.environ:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What imports have made is not looked through again at every garbage collection."""
    gc.collect()
    gc.freeze()
