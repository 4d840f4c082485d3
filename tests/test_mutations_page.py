"""`tests/mutations.md` lists every fault that the tests put in, and every test that puts one in registers it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import mutations
from tests.faults import FAULTS
from tests.sampling import OLDEST

pytestmark = pytest.mark.skipif(OLDEST, reason="some faults are of code that newer versions of Transformers run")


def test_the_page_of_faults_is_made_of_their_registry() -> None:
    assert mutations.PAGE.read_text() == mutations.page(), "stale: run `python -m tests.mutations`"
    assert len(FAULTS) >= 45


def test_every_file_that_registers_faults_is_on_the_page() -> None:
    root = Path(__file__).parent
    files = {
        ".".join(["tests", *path.relative_to(root).with_suffix("").parts])
        for path in root.rglob("*.py")
        if re.search(r"^ *@(faults\.)?fault\(", path.read_text(), re.M)
    }
    assert files == set(mutations.WHERE)


def test_every_fault_replaces_something_of_axattns() -> None:
    mutations.page()
    for fault in FAULTS.values():
        assert any(name.startswith("axattn.") for name in fault.changes()), fault.name
