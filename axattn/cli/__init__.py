"""The command line: a verb a file. A user's mistake is one line on stderr, never a traceback, and with ``--json`` it is
JSON on stdout too."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from axattn.cli import bench, demo, doctor, migrate, plan, verify


class Verbs(TyperGroup):
    """The verbs. Wrong usage (an unknown option, a missing argument) is JSON on stdout where ``--json`` is among the
    arguments; Typer then prints its own lines on stderr and exits with 2, as without."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        """As Typer's, which takes the arguments apart."""
        self.as_json = "--json" in args
        return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        """As Typer's, which takes those of the verb apart and runs it."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if self.as_json and hasattr(error, "format_message"):
                from axattn.cli.output import described, print_json

                print_json({"error": described(error)})
            raise


app = typer.Typer(
    name="axattn",
    cls=Verbs,
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
