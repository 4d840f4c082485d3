"""Terminal tables at any width: whole words, no ellipsis, every reason complete."""

from __future__ import annotations

import io
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import axattn
from axattn.tools.rows import Rows
from axattn.tools.tables import plan_table
from tests.models import build

WIDTHS = (40, 80, 120, 200)
FIX = 'pip install "axattn[demo]" --no-build-isolation'
LONG = f"flash_attention_2 needs an NVIDIA GPU (sm80 or newer); this machine has none\n  → {FIX}"


def shown(what: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert all(line.rstrip()[-1] in "│┃┓┩┘" for line in text.splitlines() if line[0] in "│┃┏┡└")
    return text


def words(text: str) -> str:
    """Only the words, so that borders and line breaks don't matter."""
    return " ".join(re.sub(r"[│┃┏┓┡┩└┘┳╇┴━─┼├┤╈]", " ", text).split())


def doctor() -> Rows:
    rows = Rows("kernel", "runs here", "exact", "packs", reason="why not, and the fix", title="Kernels")
    rows.add("sdpa", "yes", "yes", "without a cache")
    rows.add("flash_attention_2", "no", "yes", "yes", reason=LONG)
    return rows


@pytest.mark.parametrize("width", WIDTHS)
def test_reasons_are_wrapped_and_never_cut(width: int) -> None:
    text = shown(doctor(), width)
    for name in ("sdpa", "flash_attention_2", "Kernels"):
        assert name in text
    for part in LONG.replace("\n", " ").split():
        assert part in words(text).split(), part
    assert words(FIX) in words(text) or width in {120}  # there a column of reasons wraps beside other cells


def test_the_width_decides_where_reasons_stand() -> None:
    wide, narrow, narrowest = (shown(doctor(), width) for width in (120, 80, 40))
    assert "why not, and the fix" in wide
    assert "kernel flash_attention_2\n" in narrow
    assert "┃" in narrow
    assert "┃" not in narrowest
    assert "runs here no, exact yes" in narrowest


@given(
    st.lists(st.text(string.ascii_letters + " []", max_size=60), min_size=1, max_size=5),
    st.integers(34, 160),
)
def test_no_word_is_lost_at_any_width(reasons: list[str], width: int) -> None:
    rows = Rows("name", "value", reason="why")
    for number, reason in enumerate(reasons):
        rows.add(f"row{number}", "1.5", reason=reason)
    text = "".join(words(shown(rows, width)).split())
    for reason in reasons:
        for word in reason.split():
            assert word[: width // 3] in text


def test_a_row_has_a_cell_per_column() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Rows("a", "b").add("one")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("machine", ["sm90", "cpu"])
def test_a_plan_names_every_alternative_with_its_cost(machine: str, width: int) -> None:
    plan = axattn.plan(build("gemma2").config, environment=machine)
    text = words(shown(plan_table(plan, 8192), width))
    chosen = plan.layers[0].chosen
    assert f"{chosen}, " in text
    for first in (plan.layers[0], plan.layers[1]):
        for rejected in first.rejected:
            for reason in rejected.reasons:
                for word in reason.text.split():
                    assert word in text
    joined = "".join(text.split())
    assert "eager,8.59GFLOPand1.5GiB:" in joined  # 2 * 4 heads * 8192^2 pairs * (8 + 8); 6 bytes per weight
