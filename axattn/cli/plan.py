"""``axattn plan MODEL``: which kernel each layer of a model gets, and why not the others. Loads no weights."""

from __future__ import annotations

import typer


def plan(
    model: str = typer.Argument(..., metavar="MODEL", help="Local folder, config.json, or hub name."),
    attn: str = typer.Option("auto", "--attn", metavar="NAME", help="Attention implementation to plan for."),
    route: bool = typer.Option(False, "--route", help="Send what NAME can't serve to the next exact kernel."),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Show which kernel each layer of a model gets, and why not the others. No weights are loaded.

    Examples:
        axattn plan ./my-model

        axattn plan ./my-model --attn varlen --route --json
    """
    from axattn.cli.output import print_json, quiet_transformers, user_errors

    with user_errors():
        quiet_transformers()
        import axattn

        found = axattn.plan(model, attn, on_unsupported="route" if route else "raise")
        if as_json:
            print_json(found.to_dict())
        else:
            from axattn.cli.tables import print_plan

            print_plan(found)
