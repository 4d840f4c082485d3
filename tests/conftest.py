"""Shared fixtures. GPU tests are skipped with the reason where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests import interpreter

torch.set_num_threads(1)
interpreter.choose()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or "AXATTN_GPU_TESTS_ON" in os.environ:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
