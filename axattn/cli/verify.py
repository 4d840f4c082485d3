"""``axattn verify MODEL``: checks a kernel on a model against eager."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from axattn.cli.completion import attention_names

if TYPE_CHECKING:
    from axattn.tools.verify.records import Verification


def verify(
    model: str = typer.Argument(..., metavar="MODEL", help="Local folder, config.json, or hub name."),
    attn: str = typer.Option(
        "auto",
        "--attn",
        metavar="NAME",
        autocompletion=attention_names,
        help="Attention implementation to verify.",
    ),
    route: bool = typer.Option(False, "--route", help="Route layers that NAME can't serve to the next exact kernel."),
    data: Path | None = typer.Option(None, "--data", metavar="FILE", help="Text file that supplies the tokens."),
    layers: int = typer.Option(0, "--layers", min=0, help="Keep the first N layers (0: one of each kind, at most 8)."),
    length: int = typer.Option(96, "--length", min=12, help="Tokens per row (one scenario exceeds the window)."),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Run a kernel on a model through padding, packing, decoding and gradients, and compare with eager in fp32.

    Exit code 1 if a check fails or none could run. Weights are loaded if they exist, else random.

    Examples:
        axattn verify ./my-model

        axattn verify ./my-model --attn sage --layers 4 --data some.txt
    """
    from axattn.cli.output import print_json, quiet_transformers, user_errors
    from axattn.hf.checkpoints import require_source

    with user_errors(as_json):
        require_source(model)  # before Transformers is imported
        quiet_transformers()
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        import axattn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, transient=True, disable=as_json, console=Console(stderr=True)) as bar:
            task = bar.add_task("loading")
            found = axattn.verify(
                model,
                attn,
                data=data,
                layers=layers or None,
                length=length,
                on_unsupported="route" if route else "raise",
                progress=lambda name: bar.update(task, description=name),
            )
        if as_json:
            print_json(found.to_dict())
        else:
            _print(found)
    if not found.right:
        raise typer.Exit(1)


def _print(found: Verification) -> None:
    from rich.console import Console
    from rich.text import Text

    from axattn.tools.rows import Rows

    console = Console()
    used = ", ".join(f"{name} {count}" for name, count in found.kernels.items()) or "Transformers' own"
    console.print(
        f"[bold]{found.model}[/bold] on {found.asked}: {found.layers} layers, {found.weights} weights, "
        f"{found.dtype}, {found.device}; calls: {used}"
    )
    table = Rows("scenario", "result", "error", "budget", reason="detail")
    colours = {"ok": "green", "refused": "yellow", "wrong": "red"}
    for check in found.checks:
        shown = Text(check.outcome, colours[check.outcome])
        numbers = ["-" if value is None else f"{value:.2g}" for value in (check.error, check.budget)]
        table.add(check.scenario, shown, *numbers, reason=check.detail)
    console.print(table)
    console.print(found.verdict if found.right else f"[red]{found.verdict}[/red]")
