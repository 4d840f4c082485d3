"""How much of the sweeps a run of the tests takes. No test lives here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
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


def part_of(cases: Iterable[Any], kept: Iterable[Any], as_one: Callable[[Any], str] | None = None) -> list[Any]:
    """The cases of a test as its parameters: ``make test`` runs those kept, ``make nightly`` the others.

    Args:
        cases: values of one parameter, or tuples of those of several.
        kept: some of them.
        as_one: names each case, where a tuple is the value of one parameter.

    Raises:
        ValueError: one of those kept is no case.
    """
    cases, kept = list(cases), list(kept)
    if unknown := [case for case in kept if case not in cases]:
        raise ValueError(f"no such cases: {unknown}")
    made = []
    for case in cases:
        values = case if isinstance(case, tuple) and as_one is None else (case,)
        marks = () if case in kept else pytest.mark.nightly
        made.append(pytest.param(*values, marks=marks, id=None if as_one is None else as_one(case)))
    return made
