"""``python -m tests.census``: try every architecture (or some) and print what is wrong; --write makes the page."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys

import rich.console
from tqdm import tqdm

from tests import distributed
from tests.census import report, split
from tests.census.examine import Finding, Record, every, examine

RANKS = 2
TOGETHER = 24
"""Architectures by start of a process group."""


def _prepare() -> None:
    import logging
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _one(key: tuple[str, str]) -> Record:
    return examine(key[1], key[0])


def _over_ranks(keys: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Finding]]:
    """What splitting the rows of decoders over two processes gives."""
    found: dict[tuple[str, str], dict[str, Finding]] = {}
    for at in range(0, len(keys), TOGETHER):
        mine, other = distributed.run(RANKS, split.examine, keys[at : at + TOGETHER])
        assert mine == other, "the ranks disagree"
        found |= split.summaries(mine)
    return found


def main() -> int:
    """Run; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_type", nargs="*", help="only these")
    parser.add_argument("--write", action="store_true", help="write docs/models.{json,md}; takes every architecture")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.write and arguments.model_type:
        parser.error("the page is about every architecture")
    keys = [key for key in every() if not arguments.model_type or key[1] in arguments.model_type]
    context = multiprocessing.get_context("fork")
    with context.Pool(arguments.processes, _prepare, maxtasksperchild=16) as pool:
        records = list(tqdm(pool.imap(_one, keys), total=len(keys)))
    built = {(record.head, record.model_type) for record in records if not record.skipped}
    parts = _over_ranks([key for key in split.decoders() if key in built])
    for at, record in enumerate(records):
        if (record.head, record.model_type) in parts:
            findings = {**record.findings, **parts[record.head, record.model_type]}
            records[at] = dataclasses.replace(record, findings=findings)
    console = rich.console.Console()
    bad = [(r, key, f) for r in records for key, f in r.findings.items() if f.status == "wrong"]
    for record, key, finding in bad:
        console.print(f"[red]wrong[/] {record.head} {record.model_type} / {key}: {finding.detail}", highlight=False)
    tried = [record for record in records if not record.skipped]
    console.print(f"{len(tried)} of {len(records)} architectures tried, {len(bad)} wrong")
    if arguments.write:
        import torch
        import transformers

        versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
        report.RECORD.write_text(report.dump(records, versions))
        report.PAGE.write_text(report.render(records, versions))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
