"""Work of the slowest rank with and without ``PackingCollator(balance="flops")``: ``python -m benchmarks.balance``.

Counts FLOPs of rows of log-normal lengths; runs no model. Writes the table of docs/packing.md.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import chain
from statistics import mean

from axattn.documents.packed_rows import LINEAR_COST, balanced_rows, document_work, first_fit_decreasing
from benchmarks.measure import ROOT

PAGE = ROOT / "docs" / "packing.md"
BEGIN, END = "<!-- made by python -m benchmarks.balance -->\n", "<!-- end -->"
MAX_LENGTH, MEAN, SIGMA, BATCHES = 4096, 750, 1.0, 10
RANKS = (2, 8, 64)
DOCUMENTS = (8, 32)
"""Documents per rank."""

Shares = Sequence[Sequence[Sequence[int]]]
"""For each rank its rows of lengths."""


def lengths(count: int, seed: int) -> list[int]:
    """Log-normal lengths from 1 to `MAX_LENGTH`, of mean `MEAN` before they are capped."""
    draw = random.Random(seed)  # no secret
    center = math.log(MEAN) - SIGMA**2 / 2
    return [min(max(int(draw.lognormvariate(center, SIGMA)), 1), MAX_LENGTH) for _ in range(count)]


def separate(documents: Sequence[int], ranks: int, capacity: int | None) -> Shares:
    """Each rank packs its own documents."""
    each = len(documents) // ranks
    shares = []
    for start in range(0, len(documents), each):
        own = documents[start : start + each]
        rows = [list(range(each))] if capacity is None else first_fit_decreasing(own, capacity)
        shares.append([[own[i] for i in row] for row in rows])
    return shares


def balanced(documents: Sequence[int], ranks: int, capacity: int | None) -> Shares:
    """Each rank packs its share of all documents."""
    work = [document_work(tokens, LINEAR_COST) for tokens in documents]
    shares = balanced_rows(documents, work, capacity, ranks)
    return [[[documents[i] for i in row] for row in rows] for rows in shares]


def work(rows: Sequence[Sequence[int]]) -> int:
    """What a rank runs: its rows and the padding after each, a document of its own, up to the longest of them."""
    size = max(map(sum, rows))
    padding = [size - sum(row) for row in rows]
    return sum(document_work(tokens, LINEAR_COST) for tokens in (*chain(*rows), *padding))


def line(ranks: int, each: int, capacity: int | None) -> str:
    """A row of the table."""
    found: dict[str, list[float]] = {"separate": [], "balanced": [], "slowest": [], "rows": []}
    for batch in range(BATCHES):
        documents = lengths(ranks * each, batch)
        own, even = separate(documents, ranks, capacity), balanced(documents, ranks, capacity)
        before, after = [work(rows) for rows in own], [work(rows) for rows in even]
        found["rows"].append(len(even[0]))
        found["separate"].append(max(before) / mean(before))
        found["balanced"].append(max(after) / mean(after))
        found["slowest"].append(max(after) / max(before))
    rows = "1" if capacity is None else f"{mean(found['rows']):.1f}"
    figures = " | ".join(f"{mean(found[name]):.2f}" for name in ("separate", "balanced", "slowest"))
    return f"| {'None' if capacity is None else f'{capacity:,}'} | {each} | {rows} | {ranks} | {figures} |"


def table() -> str:
    """The table, Markdown."""
    head = "| `max_length` | documents a rank | rows a rank | ranks | worst / mean, each rank by itself | "
    head += "worst / mean, balanced | slowest rank, balanced / by itself |\n|---|---|---|---|---|---|---|\n"
    sizes = ((MAX_LENGTH, DOCUMENTS[0]), (MAX_LENGTH, DOCUMENTS[1]), (None, DOCUMENTS[0]), (None, DOCUMENTS[1]))
    return head + "".join(f"{line(ranks, each, capacity)}\n" for capacity, each in sizes for ranks in RANKS)


def page(text: str) -> str:
    """docs/packing.md with its table made again."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
