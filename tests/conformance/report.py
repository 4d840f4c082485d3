"""The record of a run of the matrix (JSON) and the document made of it. No cell runs here."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tests.conformance.cells import BACKENDS, Cell
from tests.conformance.families import FAMILIES
from tests.conformance.scenarios import SCENARIOS

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECORD, DOCUMENT = DOCS / "conformance.json", DOCS / "conformance.md"


def record(cells: Iterable[Cell], versions: dict[str, str]) -> dict[str, Any]:
    """A compact JSON-ready record: every distinct refusal once, cells by backend and scenario."""
    reasons: list[str] = []
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        value: Any = cell.status
        if cell.status == "refused":
            if cell.detail not in reasons:
                reasons.append(cell.detail)
            value = reasons.index(cell.detail)
        elif cell.status == "wrong":
            value = f"wrong: {cell.detail}"
        found.setdefault(cell.backend, {}).setdefault(cell.scenario, {})[cell.family] = value
    return {"versions": versions, "refusals": reasons, "cells": found}


def cells_of(recorded: dict[str, Any]) -> list[Cell]:
    """The cells of a record (without their errors)."""
    found = []
    for backend, rows in recorded["cells"].items():
        for scenario, row in rows.items():
            for family, value in row.items():
                kind = status(value)
                detail = recorded["refusals"][value] if kind == "refused" else str(value).removeprefix("wrong: ")
                found.append(Cell(backend, family, scenario, kind, detail="" if kind == "ok" else detail))
    return found


def load() -> dict[str, Any]:
    """The committed record."""
    read: dict[str, Any] = json.loads(RECORD.read_text())
    return read


def dump(recorded: dict[str, Any]) -> str:
    """The record as text: one line per backend and scenario, so that changes show in a diff."""
    lines = ["{", f' "versions": {json.dumps(recorded["versions"])},', ' "refusals": [']
    lines += [f"  {json.dumps(text)}," for text in recorded["refusals"]]
    lines[-1] = lines[-1].rstrip(",") + "\n ],"
    lines.append(' "cells": {')
    for backend, rows in recorded["cells"].items():
        lines.append(f"  {json.dumps(backend)}: {{")
        lines += [f"   {json.dumps(name)}: {json.dumps(row)}," for name, row in rows.items()]
        lines[-1] = lines[-1].rstrip(",") + "},"
    lines[-1] = lines[-1].rstrip(",") + "}"
    return "\n".join([*lines, "}"]) + "\n"


def status(value: Any) -> Literal["ok", "refused", "wrong"]:
    """``ok``, ``refused`` or ``wrong`` of a recorded value."""
    if isinstance(value, int):
        return "refused"
    return "ok" if value == "ok" else "wrong"


def totals(recorded: dict[str, Any]) -> dict[str, collections.Counter[str]]:
    """How many cells of each status, by backend."""
    return {
        backend: collections.Counter(status(value) for row in rows.values() for value in row.values())
        for backend, rows in recorded["cells"].items()
    }


def render(recorded: dict[str, Any]) -> str:
    """The document."""
    cells, versions = recorded["cells"], recorded["versions"]
    backends = [name for name in BACKENDS if name in cells]
    lines = [
        "# Conformance",
        "",
        "Made by `make conformance` from `docs/conformance.json`; do not edit.",
        "",
        f"{len(FAMILIES)} tiny models, {len(SCENARIOS)} scenarios, {len(backends)} names and policies, on a CPU (where "
        "kernels that need a GPU are strict fakes), with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". A cell is **ok** when outputs (and gradients, and generated tokens) equal Transformers' eager attention",
        "on each document alone, to 1e-5 relative (2e-5 for gradients, 6e-2 under bf16 autocast); **refused** when",
        "axattn says why it won't run; **wrong** never.",
        "",
        "| name | ok | refused | wrong |",
        "|---|---|---|---|",
    ]
    for backend, count in totals(recorded).items():
        lines.append(f"| `{backend}` | {count['ok']} | {count['refused']} | {count['wrong']} |")
    lines += ["", "## By scenario: ok / refused", "", "| scenario | " + " | ".join(f"`{b}`" for b in backends) + " |"]
    lines.append("|---|" + "---|" * len(backends))
    for name in SCENARIOS:
        counts = []
        for backend in backends:
            row = collections.Counter(status(value) for value in cells[backend].get(name, {}).values())
            wrong = f" / **{row['wrong']} wrong**" if row["wrong"] else ""
            counts.append(f"{row['ok']} / {row['refused']}{wrong}" if row else "")
        lines.append(f"| {name} | " + " | ".join(counts) + " |")
    lines += ["", "## By family: ok / refused", "", "| family | " + " | ".join(f"`{b}`" for b in backends) + " |"]
    lines.append("|---|" + "---|" * len(backends))
    for name, family in FAMILIES.items():
        counts = []
        for backend in backends:
            row = collections.Counter(status(r[name]) for r in cells[backend].values() if name in r)
            counts.append(f"{row['ok']} / {row['refused']}")
        features = f" ({', '.join(sorted(family.features))})" if family.features else ""
        lines.append(f"| {name}{features} | " + " | ".join(counts) + " |")
    lines += ["", "## Why cells are refused", ""]
    for backend in backends:
        why: collections.Counter[str] = collections.Counter()
        for row in cells[backend].values():
            for value in row.values():
                if isinstance(value, int):
                    why.update(recorded["refusals"][value].split("; "))
        lines += [f"### `{backend}`", ""]
        lines += [f"- {count}: {text}" for text, count in sorted(why.items(), key=lambda item: (-item[1], item[0]))]
        lines += [] if why else ["Nothing."]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
