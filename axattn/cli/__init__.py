"""The command line, one file per verb. User errors are one line on stderr without a traceback, and also JSON on stdout
with ``--json``."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from axattn.cli import bench, demo, doctor, migrate, plan, verify


class Verbs(TyperGroup):
    """The verbs. With ``--json``, usage errors (an unknown option, a missing argument) are JSON on stdout too. In any
    case Typer prints its own message on stderr and exits with 2."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        """As in Typer, which parses the arguments here."""
        self.as_json = "--json" in args
        return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        """As in Typer, which parses the verb's arguments here and runs it."""
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
    """Run the command line; axattn's errors become one line on stderr and exit code 1."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
