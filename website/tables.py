"""The tables of models and of conformance as the site shows them: rows for a search box, made of what docs/ holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HEADS = {
    "Decoders": "decoder",
    "Encoders": "encoder",
    "Encoder-decoders": "encoder-decoder",
    "Vision-language models": "vision-language",
    "Heads that classify tokens": "classifies tokens",
    "Heads that classify rows": "classifies rows",
    "Question-answering heads": "question answering",
    "Models without a head": "no head",
}
"""The sections of models.md that are tables of models, and what the column of the site says."""


def models(docs: Path) -> dict[str, Any]:
    """``{columns, rows, reasons}``: a row for each architecture and head. A cell with numbers is refused, for the
    reasons of these numbers."""
    sections = dict(_sections((docs / "models.md").read_text()))
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", sections["Refusals"], re.M))
    columns: list[str] = ["architecture", "head"]
    found: list[dict[str, str]] = []
    for title, head in HEADS.items():
        names, *rows = _table(sections[title])
        columns += [name for name in names if name not in columns]
        found += [{**dict(zip(names, row, strict=True)), "head": head} for row in rows]
    columns.insert(columns.index("varlen"), columns.pop(columns.index("images")))  # the kernels come last
    return {"columns": columns, "rows": [[row.get(name, "") for name in columns] for row in found], "reasons": reasons}


def conformance(docs: Path) -> dict[str, Any]:
    """The same of the matrix: a row for each model family and scenario, a column for each name."""
    recorded = json.loads((docs / "conformance.json").read_text())
    cells: dict[str, dict[str, dict[str, Any]]] = recorded["cells"]
    pairs = dict.fromkeys((family, name) for rows in cells.values() for name, row in rows.items() for family in row)
    families = list(dict.fromkeys(family for family, _ in pairs))
    rows = []
    for family, scenario in sorted(pairs, key=lambda pair: families.index(pair[0])):
        found = [cells[backend].get(scenario, {}).get(family, "") for backend in cells]
        rows.append([family, scenario, *(value if isinstance(value, str) else str(value + 1) for value in found)])
    reasons = {str(number): text for number, text in enumerate(recorded["refusals"], 1)}
    return {"columns": ["family", "scenario", *cells], "rows": rows, "reasons": reasons}


KEPT = {"models": ("Errors raised by Transformers", "Not tried"), "conformance": ()}
"""The sections that stay, as they are no table."""


def page(name: str, markdown: str) -> str:
    """The page with a table and a search box in the place of its Markdown tables; its introduction stays."""
    introduction, *_ = markdown.partition("\n## ")
    found = [(title, text.replace("[", "\\[")) for title, text in _sections(markdown) if title in KEPT[name]]
    kept = [f"## {title}\n{text}" for title, text in found]
    hint = {"models": "llama sage", "conformance": "gemma2 packed"}[name]
    box = (
        f'<div class="records" data-source="../assets/{name}.json" markdown="0">\n'
        f'<label>Search <input type="search" placeholder="{hint}" autocomplete="off"></label>\n'
        '<label><input type="checkbox"> only rows with a refusal</label>\n'
        '<p class="count" role="status"></p>\n<div class="rows" tabindex="0"></div>\n<ol class="reasons"></ol>\n'
        "<noscript>The table needs JavaScript; the repository has it as Markdown.</noscript>\n</div>\n"
    )
    return "\n".join([introduction, "", box, *kept])


def _sections(markdown: str) -> list[tuple[str, str]]:
    parts = re.split(r"^## (.*)$", markdown, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, its line of dashes left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines]
