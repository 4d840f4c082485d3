"""``axattn migrate FILE…``: rewrites axolotl YAML to one ``attn_implementation``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from axattn.tools.axolotl.migration import Migration


def migrate(
    paths: list[Path] = typer.Argument(..., metavar="FILE…", help="YAML files, or folders of them."),
    write: bool = typer.Option(False, "--write", help="Rewrite the files; without it only the diff is printed."),
    check: bool = typer.Option(False, "--check", help="Exit with 1 if anything would change (for CI)."),
    exclude: list[str] = typer.Option(
        [], "--exclude", metavar="PATTERN", help="Files and folders to skip (*.gen.yml, old); repeatable."
    ),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Rewrite axolotl YAML: legacy booleans and short forms become one attn_implementation. Comments are kept.

    All files are read before any is rewritten. A file that has a conflict or can't be read is left unchanged and
    reported with the line; the other files are still processed, and the exit code is 1. In folders, files without an
    attention setting are skipped.

    Examples:
        axattn migrate config.yml

        axattn migrate configs/ --write --exclude old

        axattn migrate configs/ --check
    """
    from rich.console import Console
    from rich.progress import track

    from axattn.cli.output import print_json, user_errors
    from axattn.errors import InvalidConfigError
    from axattn.tools.axolotl.migration import find, migrate_found

    with user_errors(as_json):
        if write and check:
            advice = "Use --check to see whether anything would change, or --write to change it."
            raise InvalidConfigError("--write and --check contradict each other", advice=advice)
    console = Console(stderr=True)
    found = find(paths, exclude)
    bar = track(found, "reading", console=console, transient=True, disable=not sys.stderr.isatty())
    looked = [migrate_found(one) for one in bar]
    done = [one for one in looked if one is not None]
    if write:
        done = [_written(one) for one in done]
    if as_json:
        print_json([one.to_dict() for one in done])
    else:
        _print(done, "rewritten" if write else "would change", len(looked) - len(done))
    if any(one.problems for one in done) or (check and any(one.changed for one in done)):
        raise typer.Exit(1)


def _written(one: Migration) -> Migration:
    """Write one file; a write error becomes its problem."""
    from axattn.tools.axolotl.migration import write_file
    from axattn.tools.axolotl.yaml_nodes import Problem

    try:
        write_file(one)
    except OSError as error:
        return dataclasses.replace(one, after=one.before, problems=(Problem(1, f"can't be written: {error.strerror}"),))
    return one


def _print(done: list[Migration], verb: str, skipped: int) -> None:
    for one in done:
        typer.echo(one.diff(), nl=False)
        for note in one.notes:
            typer.echo(f"{one.shown}: {note}", err=True)
        for problem in one.problems:
            typer.echo(f"{one.shown}:{problem.line}: {problem.text}", err=True)
    parts = [f"{len(done)} files", f"{sum(one.changed for one in done)} {verb}"]
    left = sum(bool(one.problems) for one in done)
    parts += [f"{left} left unchanged because of problems"] if left else []
    parts += [f"{skipped} skipped (no attention setting)"] if skipped else []
    typer.echo(", ".join(parts), err=True)
