"""``axattn demo``: a packed fine-tune on this machine, with checks of its results."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import typer

from axattn.cli.completion import attention_names


def demo(
    output: Path = typer.Option(Path("demo-output"), "--output", "-o", help="Folder for the model, plot and report."),
    attn: str = typer.Option(
        "auto",
        "--attn",
        metavar="NAME",
        autocompletion=attention_names,
        help="Attention implementation to train with.",
    ),
    steps: int = typer.Option(200, "--steps", min=2, help="Optimiser steps."),
    seed: int = typer.Option(0, "--seed", help="Seed of weights, data order and split."),
    as_json: bool = typer.Option(False, "--json", help="Print the report on stdout, everything else on stderr."),
) -> None:
    """Fine-tune a small LLaMA on packed rows of Python's standard library, and check that no document leaks.

    Downloads nothing; leaves the model, loss.png and report.json in the output folder (matplotlib and torch keep caches
    of their own: a list of fonts, and torchinductor_USER in the temporary folder).

    Examples:
        axattn demo

        axattn demo --attn varlen --steps 40 --output /tmp/demo
    """
    from importlib.util import find_spec

    from axattn.cli.output import quiet_transformers, user_errors
    from axattn.errors import BackendUnavailableError, Reason
    from axattn.spec import names

    with user_errors(as_json):
        absent = [name for name in ("accelerate", "matplotlib", "tokenizers") if find_spec(name) is None]
        if absent:
            raise BackendUnavailableError(
                "the demo can't run here",
                [Reason("library", f"{name} is not installed") for name in absent],
                'Type: pip install "axattn[demo]".',
            )
        wanted = names.canonicalise(attn)  # before any work
        from axattn.tools.demo.announcement import announcement

        typer.echo(announcement(output, wanted, steps), err=as_json)  # before torch is imported, which takes seconds
        quiet_transformers()
        from axattn.machine.environment import Environment
        from axattn.planning.planner import require_available

        require_available(wanted, Environment.current())
        from axattn.tools.demo.job import run

        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            failed = run(output, attn, steps, seed)
        if as_json:
            typer.echo((output / "report.json").read_text(encoding="utf-8"), nl=False)
    if failed:
        raise typer.Exit(1)
