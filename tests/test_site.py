"""What the site is made of, without its generator (`make site` builds it, and fails on broken links)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import axattn
from website import tables

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MENU = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]


def test_every_page_is_in_the_menu() -> None:
    named = set(re.findall(r"([\w-]+\.md)$", MENU, re.M))
    assert named == {page.name for page in DOCS.glob("*.md")} | {"index.md", "contributing.md", "changelog.md"}


def test_every_public_name_is_in_the_reference() -> None:
    assert sorted(re.findall(r"^::: axattn\.(\w+)$", (DOCS / "api.md").read_text(), re.M)) == sorted(axattn.__all__)


def test_the_table_of_models_has_every_row_of_the_page() -> None:
    made = tables.models(DOCS)
    page = (DOCS / "models.md").read_text().split("\n## Refusals")[0]
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| architecture")]
    assert len(made["rows"]) == len(lines) > 800
    assert {len(row) for row in made["rows"]} == {len(made["columns"])}
    (llama,) = (row for row in made["rows"] if row[:2] == ["llama", "decoder"])
    assert llama[made["columns"].index("packed")] == "ok"
    (afmoe,) = (row for row in made["rows"] if row[:2] == ["afmoe", "decoder"])
    assert "no sliding window" in made["reasons"][afmoe[made["columns"].index("fp8")]]


def test_the_table_of_conformance_has_every_cell() -> None:
    made = tables.conformance(DOCS)
    cells = json.loads((DOCS / "conformance.json").read_text())["cells"]
    recorded = sum(len(row) for rows in cells.values() for row in rows.values())
    assert sum(cell != "" for row in made["rows"] for cell in row[2:]) == recorded
    at = made["columns"].index("sage")
    (softcap,) = (row for row in made["rows"] if row[:2] == ["gemma2", "dense"])
    value = cells["sage"]["dense"]["gemma2"]
    assert softcap[at] == (value if isinstance(value, str) else str(value + 1))
    assert all(cell in {"", "ok"} or cell in made["reasons"] for row in made["rows"] for cell in row[2:])


def test_the_pages_of_records_keep_their_introduction_and_what_is_no_table() -> None:
    page = tables.page("models", (DOCS / "models.md").read_text())
    assert page.startswith("# Models")
    assert "*refused*: an error with its reason" in page
    assert 'data-source="../assets/models.json"' in page
    assert "| llama |" not in page
    assert "## Not tried" in page
