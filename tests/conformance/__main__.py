"""``python -m tests.conformance``: run the matrix (or a part) and print the summary; --write makes the document."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator

import rich.console
import rich.table
from tqdm import tqdm

from tests.conformance import cells, report


def _prepare() -> None:
    import logging
    import os
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"


def _run(keys: list[tuple[str, str, str]]) -> list[cells.Cell]:
    return [cells.run(*key) for key in keys]


def _groups(keys: list[tuple[str, str, str]]) -> Iterator[list[tuple[str, str, str]]]:
    """Cells of one backend and family together: they share the model's folder."""
    together: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for key in keys:
        together.setdefault(key[:2], []).append(key)
    yield from together.values()


def main() -> int:
    """Run; 1 if any cell is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("backend", "family", "scenario"):
        parser.add_argument(f"--{name}", action="append", help="only this one (may be repeated)")
    parser.add_argument("--sampled", action="store_true", help="only the cells that `make test` runs")
    parser.add_argument("--write", action="store_true", help="write docs/conformance.{json,md}; a part goes in")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    asked = (arguments.backend, arguments.family, arguments.scenario)
    keys = [
        key
        for key in cells.every_key()
        if all(not only or part in only for only, part in zip(asked, key, strict=True))
        and (not arguments.sampled or cells.sampled(key))
    ]
    found: dict[tuple[str, str, str], cells.Cell] = {}
    if arguments.write and report.RECORD.exists():
        found = {(cell.backend, cell.family, cell.scenario): cell for cell in report.cells_of(report.load())}
    absent = [key for key in cells.every_key() if key not in found and key not in keys]
    if arguments.write and absent:
        parser.error(f"the record lacks {len(absent)} cells that this run would not make: run the whole matrix")
    console = rich.console.Console()
    context = multiprocessing.get_context("fork")
    with context.Pool(arguments.processes, _prepare, maxtasksperchild=8) as pool, tqdm(total=len(keys)) as bar:
        for done in pool.imap_unordered(_run, _groups(keys)):
            bar.update(len(done))
            for cell in done:
                found[cell.backend, cell.family, cell.scenario] = cell
                if cell.status == "wrong":
                    console.print(f"[red]wrong[/] {cell.backend} / {cell.family} / {cell.scenario}: {cell.detail}")
    ordered = [found[key] for key in (cells.every_key() if arguments.write else keys)]
    recorded = report.record(ordered, _versions())
    table = rich.table.Table("name", "ok", "refused", "wrong")
    for backend, count in report.totals(recorded).items():
        table.add_row(backend, *(str(count[status]) for status in ("ok", "refused", "wrong")))
    console.print(table)
    if arguments.write:
        report.DOCS.mkdir(exist_ok=True)
        report.RECORD.write_text(report.dump(recorded))
        report.DOCUMENT.write_text(report.render(recorded))
    return int(any(cell.status == "wrong" for cell in ordered))


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


if __name__ == "__main__":
    sys.exit(main())
