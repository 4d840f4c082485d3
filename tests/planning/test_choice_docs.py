from __future__ import annotations

from pathlib import Path

from axattn import backends
from axattn.planning import choice_docs
from axattn.spec.capability import missing

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choose.md"


def rows(of: str) -> dict[str, list[str]]:
    """The rows of a section's table by their first cell."""
    section = choice_docs.page().split(f"## {of}\n")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:2] == "| "
    ]
    return {row[0]: row[1:] for row in cells}


def test_the_page_is_made_of_records_and_ranks() -> None:
    assert PAGE.read_text() == choice_docs.page(), "stale: run `make docs`"


def test_what_is_chosen_serves_the_need_and_is_exact() -> None:
    for name in choice_docs.presets.NAMES:
        machine = choice_docs.presets.machine(name)
        for label, need in choice_docs._NEEDS:
            found = backends.get(choice_docs.chosen(need, machine))
            assert found.capability.exactness == "exact", label
            assert not missing(need, found.called_capability_on(machine)), label


def test_what_the_page_says_of_some_machines_and_needs() -> None:
    machines, needs, names = rows("By GPU"), rows("By need"), rows("What a name of your own does not serve")
    assert machines["Hopper, such as an H100"][:3] == ["`sm90`", "`varlen`", "`flash_attention_3`"]
    assert machines["Blackwell, such as a B200"][3] == "`pip install --pre flash-attn-4`"
    at = needs["need"].index("`sm80`")
    assert needs["softcap, training"][at] == "`flash_attention_2`"
    assert needs["attention weights"][at] == "`eager`"
    assert names["`fp8`"][:2] == ["no", "`sm90`"]
    assert "softcap, training" in names["`sage`"][2]
    assert "packed rows" not in names["`sage`"][2]
