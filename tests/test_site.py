"""What the site is made of, without its generator (`make site` builds it, and fails on broken links)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import axattn
from website import addresses, tables

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


def test_the_numbers_in_the_text_are_those_of_the_records() -> None:
    """What `make census` and `make conformance` count, and the pages written by hand repeat."""
    made = tables.models(DOCS)
    rows = [dict(zip(made["columns"], row, strict=True)) for row in made["rows"]]
    defaults = [row for row in rows if "," not in row["architecture"]]
    architectures, settings = len({row["architecture"] for row in defaults}), len(rows) - len(defaults)
    images = sum(row["images"] != "" for row in rows)
    count = re.search(r"(\d+) tiny models, (\d+) scenarios, (\d+) names", (DOCS / "conformance.md").read_text())
    assert count is not None
    families, scenarios, names = count.groups()
    why, tested = (" ".join((DOCS / page).read_text().split()) for page in ("why.md", "tested.md"))
    assert f"[{architectures} architectures, {len(defaults)} with their heads]" in why
    assert f"[{families} families in {scenarios} scenarios on {names} names]" in why
    assert f"({len(defaults)} can be made tiny)" in tested
    assert f"({images} of them with images), and {settings} settings" in tested
    assert f"runs {families} tiny model families" in tested
    assert f"through {scenarios} scenarios" in tested


# ---- addresses -------------------------------------------------------------------------------------------------------

NO_FILE = {
    "https://pypi.org/project/axattn",
    *(f"{addresses.repository()}{page}" for page in ("", "/issues", "/security/advisories/new")),
}
"""Pages about the project that show no file of the repository."""
WITH_ADDRESSES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *(ROOT / name for name in ("pyproject.toml", "mkdocs.yml", "CITATION.cff")),
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.yml")),
]


def require_a_file(address: str) -> None:
    """An address of the project shows a file that exists, or is a known page about the project."""
    if address.rstrip("/") in NO_FILE:
        return
    file = addresses.file_of(address)
    assert file is not None, f"{address} is not under the addresses of pyproject.toml"
    assert (ROOT / file).exists(), f"{address} shows {file}, which does not exist"


@pytest.mark.parametrize("path", WITH_ADDRESSES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_address_of_the_project_shows_something(path: Path) -> None:
    for address in re.findall(r"https?://[^\s()<>\"'`]*axattn[^\s()<>\"'`]*", path.read_text()):
        require_a_file(address.rstrip(".,;:"))


def test_readme_has_no_relative_link() -> None:
    """It is the page of the package index, too."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"\]\(([^)\s]+)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    assert len(found) > 20
    assert all(one.startswith(("https://", "#")) for pair in found for one in pair if one), found


def test_addresses_that_show_nothing_are_found() -> None:
    site, repository = addresses.project_urls()["documentation"], addresses.repository()
    for right in ("", "/", "/why/", "/why/#start", "/changelog/", "/leak-dark.svg"):
        require_a_file(site + right)
    for right in ("", "/issues", "/blob/main/docs/why.md#start", "/raw/main/docs/leak-dark.svg", "/tree/main/examples"):
        require_a_file(f"{repository}{right}")
    for wrong in ("/whi/", "/docs/why.md", "/leak.svg"):
        with pytest.raises(AssertionError, match="does not exist"):
            require_a_file(site + wrong)
    for wrong in ("/blob/main/why.md", "/raw/main/docs/leak.svg"):
        with pytest.raises(AssertionError, match="does not exist"):
            require_a_file(f"{repository}{wrong}")
    for wrong in (f"{repository}/blob/master/README.md", f"{repository}-fork", "https://example.org/axattn/why/"):
        with pytest.raises(AssertionError, match=r"not under the addresses of pyproject\.toml"):
            require_a_file(wrong)
