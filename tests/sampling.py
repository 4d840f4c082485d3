"""How much of the sweeps a run of the tests takes. No test lives here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
import transformers
from packaging.version import Version

SAMPLE = os.environ.get("AXATTN_SAMPLE", "test")
"""How much of matrix and census: what ``make test`` takes, ``thin`` (`make newest`), or ``nightly``."""
if SAMPLE not in ("test", "thin", "nightly"):
    raise ValueError(f"AXATTN_SAMPLE={SAMPLE}: test, thin or nightly")
OLDEST = Version(transformers.__version__) < Version("5.24")
"""Whether this is the second of the two versions of Transformers under test: it takes other, fewer parts."""


def part_of(cases: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """The cases of a test as its parameters: ``make test`` runs those kept, ``make nightly`` the others.

    Raises:
        ValueError: one of those kept is no case.
    """
    cases, kept = list(cases), list(kept)
    if unknown := [case for case in kept if case not in cases]:
        raise ValueError(f"no such cases: {unknown}")
    return [case if case in kept else _nightly(case) for case in cases]


def _nightly(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.nightly)
