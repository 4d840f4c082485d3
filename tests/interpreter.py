"""Triton's interpreter for a test process: the mode is chosen when triton and axattn's kernels are first imported.

The variable is taken away again, so that the planner does not offer the interpreter to tests that do not ask for it
(see `interpreting`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator

import pytest
import torch
from packaging.version import Version

from axattn.machine.environment import Environment


def _interprets() -> bool:
    """Whether there is an interpreter to use: triton 3.6's fails with NumPy 2.4."""
    try:
        return Version(importlib.metadata.version("triton")) >= Version("3.7")
    except importlib.metadata.PackageNotFoundError:
        return False


INTERPRETED = _interprets() and not torch.cuda.is_available()
"""Whether axattn's kernels run in the interpreter here."""


def choose() -> None:
    """Import axattn's kernels in the interpreter's mode; before anything else imports triton."""
    if INTERPRETED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "TRITON_INTERPRET", "1")
            from axattn.kernels import fp8_quantiser, int8_attention  # noqa: F401  # the first is looked at later

            int8_attention.quantise(torch.ones(1, 1, 16))  # a first call imports the rest of triton


@contextlib.contextmanager
def interpreting() -> Iterator[Environment]:
    """A machine without a GPU where the user has set ``TRITON_INTERPRET=1``."""
    real = Environment.current()
    machine = dataclasses.replace(real, device="cpu", architecture=None, triton_interpret=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "current", classmethod(lambda cls: machine))
        yield machine
