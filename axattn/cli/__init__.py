"""The command line: a verb a file. A user's mistake is one line on stderr, never a traceback."""

from __future__ import annotations

import sys

import typer

from axattn.cli import bench, demo, doctor, migrate, plan, verify

app = typer.Typer(
    name="axattn",
    help="Every attention kernel for Hugging Face Transformers behind one argument, and never silently wrong.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("migrate")(migrate.migrate)
app.command("demo")(demo.demo)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from axattn import __version__

        typer.echo(f"axattn {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors of ours become one line on stderr and exit code 1."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
