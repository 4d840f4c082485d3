"""``axattn migrate FILE…``: axolotl YAML to one ``attn_implementation``."""

from __future__ import annotations

from pathlib import Path

import typer


def migrate(
    paths: list[Path] = typer.Argument(..., metavar="FILE…", help="YAML files, or folders of them."),
    write: bool = typer.Option(False, "--write", help="Rewrite the files; without it only the diff is printed."),
    check: bool = typer.Option(False, "--check", help="Exit with 1 if anything would change (for CI)."),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Rewrite axolotl YAML: legacy booleans and short forms become one attn_implementation. Comments stay.

    A file with a conflict is left alone; the conflict is reported with its line, and the exit code is 1.

    Examples:
        axattn migrate config.yml

        axattn migrate configs/ --write

        axattn migrate configs/ --check
    """
    from importlib.util import find_spec

    from axattn.cli.output import print_json, user_errors
    from axattn.errors import BackendUnavailableError, Reason
    from axattn.migration import files, migrate_file

    with user_errors():
        if find_spec("ruamel") is None or find_spec("ruamel.yaml") is None:
            reason = Reason("library", "ruamel.yaml is not installed")
            raise BackendUnavailableError("migrate can't run here", [reason], 'Type: pip install "axattn[migrate]".')
        done = [migrate_file(path, write=write and not check) for path in files(paths)]
    if as_json:
        print_json([one.to_dict() for one in done])
    for one in done:
        if not as_json:
            typer.echo(one.diff(), nl=False)
            for note in one.notes:
                typer.echo(f"{one.name}: {note}", err=True)
        for problem in one.problems:
            typer.echo(f"{one.name}:{problem.line}: {problem.text}", err=True)
    changed = sum(one.changed for one in done)
    if not as_json:
        verb = "rewritten" if write and not check else "would change"
        typer.echo(f"{len(done)} files, {changed} {verb}", err=True)
    if any(one.problems for one in done) or (check and changed):
        raise typer.Exit(1)
