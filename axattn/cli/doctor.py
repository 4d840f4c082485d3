"""``axattn doctor``: what this machine can run, what it can't, why, and the command that mends it."""

from __future__ import annotations

import typer


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
    require: str = typer.Option("", "--require", metavar="NAME", help="Exit with 1 if this kernel can't run here."),
) -> None:
    """Show what this machine can run, what it can't, why, and the command that mends it.

    Examples:
        axattn doctor

        axattn doctor --json

        axattn doctor --require flash_attention_2
    """
    from axattn import names
    from axattn.cli.output import print_json, user_errors
    from axattn.diagnosis import diagnose

    with user_errors():
        wanted = names.canonicalise(require) if require else ""
        found = diagnose()
        if as_json:
            print_json(found.to_dict())
        else:
            _print_table(found)
        if wanted and wanted != "auto":
            from axattn.planning import require_available

            require_available(wanted, found.environment)


def _print_table(found: object) -> None:
    from rich.console import Console
    from rich.table import Table

    from axattn.diagnosis import Diagnosis

    assert isinstance(found, Diagnosis)
    console = Console()
    libraries = ", ".join(f"{name} {version}" for name, version in found.environment.libraries.items())
    console.print(f"[bold]{found.environment.describe()}[/bold]; Python {found.environment.python}; {libraries}")
    table = Table("kernel", "runs here", "exact", "packs", "why not, and what mends it")
    for kernel in found.kernels:
        why = "\n".join(r.text + (f"\n  → {r.fix}" if r.fix else "") for r in kernel.reasons)
        runs = "[green]yes[/green]" if kernel.usable else "[red]no[/red]"
        table.add_row(kernel.name, runs, "yes" if kernel.exact else "lossy", "yes" if kernel.packs else "no", why)
    console.print(table)
    broken = [one for one in found.contracts if one.different]
    console.print(f"{len(found.contracts) - len(broken)} of {len(found.contracts)} contracts with other packages hold.")
    for one in broken:
        cost = f"{one.contract.refused} are refused" if one.contract.refused else "nothing is refused"
        console.print(f"[red]{one.text}[/red] ({cost}; used by {', '.join(one.contract.users)})")
