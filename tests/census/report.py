"""The record of a census (JSON) and the page made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.census.examine import Finding, Record
from tests.census.scenarios import FAKED
from tests.census.variants import VARIANTS

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECORD, PAGE = DOCS / "models.json", DOCS / "models.md"
TITLES = {
    "causal": "Decoders",
    "masked": "Encoders",
    "seq2seq": "Encoder-decoders",
    "vision": "Vision-language models",
    "tokens": "Heads that classify tokens",
    "rows": "Heads that classify rows",
    "questions": "Heads that find answers",
    "none": "Models without a head",
}
COLUMNS = {
    "whole rows": ("dense: auto", "right padding: auto", "left padding: auto"),
    "generate": ("generate, left padding: auto",),
    "packed": (
        *(f"packed{how}: auto" for how in ("", " gradients", ", cu_seq_lens alone", ", from position 1")),
        "packed, numbered in the mask: auto",
    ),
    "unpad": ("right padding, unpad: auto", "left padding, unpad: auto"),
    "over ranks": ("split: auto",),
    "images": tuple(f"image{how}: auto" for how in ("", ", left padding", ", packed")),
    **{name: tuple(f"{scenario}: {name}" for scenario in ("dense", "packed")) for name in ("varlen", *FAKED)},
}
"""Columns of the tables, by the findings that they sum up."""


def dump(records: Iterable[Record], versions: dict[str, str]) -> str:
    """The record as text, a line for each architecture: its trials by number, and what is not ok among them."""
    records = list(records)
    keys = list(dict.fromkeys(key for record in records for key in record.findings))
    reasons: dict[str, int] = {}
    lines = []
    for record in records:
        if record.skipped:
            lines.append(json.dumps([record.head, record.model_type, record.skipped]))
            continue
        others: dict[Any, list[int]] = {}
        for key, finding in record.findings.items():
            if finding.status == "refused":
                others.setdefault(reasons.setdefault(finding.detail, len(reasons)), []).append(keys.index(key))
            elif finding.status != "ok":
                others.setdefault(f"{finding.status}: {finding.detail}", []).append(keys.index(key))
        trials = [keys.index(key) for key in record.findings]
        lines.append(json.dumps([record.head, record.model_type, record.model, trials, list(others.items())]))
    body = [
        f' "versions": {json.dumps(versions)},',
        ' "trials": [\n  ' + ",\n  ".join(map(json.dumps, keys)) + "\n ],",
        ' "refusals": [\n  ' + ",\n  ".join(map(json.dumps, reasons)) + "\n ],",
        ' "models": [\n  ' + ",\n  ".join(lines) + "\n ]",
    ]
    return "{\n" + "\n".join(body) + "\n}\n"


def load() -> tuple[list[Record], dict[str, str]]:
    """The committed record, and the versions it was made with."""
    return read(RECORD.read_text())


def read(text: str) -> tuple[list[Record], dict[str, str]]:
    """The inverse of `dump`."""
    raw = json.loads(text)
    records = []
    for head, model_type, *rest in raw["models"]:
        if len(rest) == 1:
            records.append(Record(model_type, head, skipped=rest[0]))
            continue
        model, trials, others = rest
        findings = {raw["trials"][at]: Finding("ok") for at in trials}
        for value, where in others:
            refused = isinstance(value, int)
            status, _, detail = ("refused", "", raw["refusals"][value]) if refused else str(value).partition(": ")
            findings |= {raw["trials"][at]: Finding(status, detail) for at in where}
        records.append(Record(model_type, head, model, findings=findings))
    return records, raw["versions"]


def render(records: list[Record], versions: dict[str, str]) -> str:
    """The page."""
    tried = [record for record in records if not record.skipped]
    plain, settings = _counts(records, VARIANTS.__contains__)
    wrong = sum(finding.status == "wrong" for record in tried for finding in record.findings.values())
    total = sum(len(record.findings) for record in tried)
    lines = [
        "# Models",
        "",
        "Made by `make census` from `docs/models.json`; do not edit.",
        "",
        f"Every architecture of Transformers {versions['transformers']} with each of the heads below, made tiny where "
        f"it can be: {plain}, with torch {versions['torch']} on a CPU (kernels that need a GPU are strict fakes). "
        f"Then {settings} settings beyond an architecture's defaults (`llama, LongRoPE`).",
        f"{total:,} trials; **{wrong} wrong**. Right means: loss, logits, generated tokens' logits and gradients equal "
        "those of Transformers' eager attention, packed rows those of each document alone; of heads that find answers, "
        "which read padding, those of Transformers' `sdpa`.",
        "A number is a refusal (an error that says why), explained at the end; *upstream* is an error of "
        "Transformers' own.",
        "",
        "- *whole rows*: dense, padded on the right, padded on the left, on `auto`; *generate* behind left padding",
        "- *packed*: rows of three documents, however they are told, and their gradients; *unpad*: padded batches with "
        "`unpad=True`",
        "- *over ranks*: `axattn.sequence_parallel` over two processes: dense, packed, padded; loss and gradients",
        "- *images*: an image in the text: alone, in a padded batch, among packed documents; empty: text alone tried",
        "- the other columns: dense / packed on that name",
    ]
    numbers: dict[str, int] = {}
    for head, title in TITLES.items():
        here = [record for record in tried if record.head == head]
        shown = [name for name in COLUMNS if any(_present(record, name) for record in here)]
        lines += ["", f"## {title}", "", "| architecture | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
        for record in here:
            lines.append(f"| {record.model_type} | " + " | ".join(_cell(record, n, numbers) for n in shown) + " |")
    lines += ["", "## Refusals", ""]
    lines += [f"{number}. {text}" for text, number in numbers.items()]
    lines += ["", "## Errors of Transformers' own", ""]
    upstream: dict[str, list[str]] = {}
    for record in tried:
        for key, finding in record.findings.items():
            if finding.status == "upstream":
                upstream.setdefault(f"{record.model_type}: {finding.detail}".rstrip(": "), []).append(
                    key.rpartition(": ")[2]
                )
    lines += [f"- {text} ({', '.join(sorted(set(keys)))})" for text, keys in upstream.items()]
    lines += ["", "GPT-2's is of float32 weights outside autocast, which the trials use: not of 16-bit ones."]
    lines += ["", "## Not tried", ""]
    lines += [f"- {r.model_type} ({TITLES[r.head].lower()}): {r.skipped}" for r in records if r.skipped]
    return "\n".join(lines) + "\n"


def _counts(records: list[Record], variant: Callable[[str], bool]) -> tuple[str, str]:
    """How many are tried, as "N of M": of architectures, and of variants."""
    parts = [[r for r in records if variant(r.model_type) is kind] for kind in (False, True)]
    first, second = (f"{sum(not r.skipped for r in part)} of {len(part)}" for part in parts)
    return first, second


def _present(record: Record, column: str) -> list[str]:
    return [key for key in COLUMNS[column] if key in record.findings]


def _cell(record: Record, column: str, numbers: dict[str, int]) -> str:
    present = _present(record, column)
    shown = [_word(record.findings[key], numbers) for key in present]
    if not shown:
        return ""
    if column in FAKED or column == "varlen":
        return shown[0] if len(set(shown)) == 1 else " / ".join(shown)
    if "packed, from position 1: auto" in present and shown[-1] == "ok":
        return "ok"  # counted from where this model counts
    worse = [word for word in dict.fromkeys(shown) if word != "ok"]
    return ", ".join(worse) or "ok"


def _word(finding: Finding, numbers: dict[str, int]) -> str:
    if finding.status == "refused":
        return str(numbers.setdefault(_plain(finding.detail), len(numbers) + 1))
    return finding.status if finding.status != "wrong" else f"**wrong** ({finding.detail})"


def _plain(detail: str) -> str:
    """The reasons of a refusal without the names of classes and kernels, which the row and the column tell."""
    kept = [part for part in detail.split("; ") if "sage:library" not in part]
    kept = [re.sub(rf"\b({'|'.join(('varlen', *FAKED))})\b", "the kernel", part) for part in kept or [detail]]
    kept = [
        re.sub(r"\b\w*[A-Z]\w*(?:Model|For[A-Z]|LMHead|Attention|Decoder|Encoder)\w*", "the model", part)
        for part in kept
    ]
    return "; ".join(dict.fromkeys(kept))
