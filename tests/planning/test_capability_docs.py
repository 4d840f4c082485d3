from __future__ import annotations

from pathlib import Path

from axattn import backends
from axattn.planning import capability_docs
from axattn.spec.capability import Capability

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backends.md"


def test_the_page_of_kernels_is_made_of_their_records() -> None:
    assert PAGE.read_text() == capability_docs.page(), "stale: run `make docs`"


def test_every_feature_has_a_row_and_every_kernel_a_column() -> None:
    assert set(capability_docs._LABELS) == set(Capability().features())
    page = capability_docs.page()
    assert all(f"**`{name}`**" in page for name in backends.builtin_names())


def test_what_the_page_says_of_some_kernels() -> None:
    page = capability_docs.page()
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    columns = rows["feature"].split(" | ")
    at = {name.strip("` |"): i for i, name in enumerate(columns)}
    assert rows["attention sinks (gpt-oss)"].split(" | ")[at["flash_attention_4"]].strip(" |") == "yes"
    assert rows["attention sinks (gpt-oss)"].split(" | ")[at["flash_attention_2"]] == "called by axattn"
    assert rows["attention sinks (gpt-oss)"].split(" | ")[at["varlen"]] == "yes"
    assert rows["sliding window"].split(" | ")[at["fp8"]] == "-"
    assert rows["Turing (sm75)"].split(" | ")[at["flash_attention_2"]] == "-"
    assert rows["Hopper (sm90)"].split(" | ")[at["flash_attention_4"]].strip(" |") == "yes"
    assert rows["exact"].split(" | ")[at["sage"]] == "-"
    assert rows["Ampere (sm86)"].split(" | ")[at["flash_attention_2"]] == "yes"
    assert rows["Blackwell (sm120)"].split(" | ")[at["flash_attention_4"]].strip(" |") == "yes"
    (of_sm120,) = (line for line in page.splitlines() if line.startswith("- `flash_attention_4`: Blackwell (sm120)"))
    assert "no attention sinks (gpt-oss)" in of_sm120
    assert "head dims up to 192" in of_sm120
