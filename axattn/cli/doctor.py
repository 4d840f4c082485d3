"""``axattn doctor``: which kernels this machine can run, why not the others, and the command that fixes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from axattn.cli.completion import attention_names

if TYPE_CHECKING:
    from axattn.errors import AxattnError
    from axattn.planning.advice import Advice
    from axattn.planning.diagnosis import Diagnosis


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
    require: str = typer.Option(
        "",
        "--require",
        metavar="NAME",
        autocompletion=attention_names,
        help="Exit with 1 if this kernel can't run here.",
    ),
) -> None:
    """Show which kernels this machine can run, why not the others, and the command that fixes it.

    Ends with the one or two commands that would gain most here.

    Examples:
        axattn doctor

        axattn doctor --json

        axattn doctor --require flash_attention_2
    """
    from axattn.cli.output import described, print_json, user_errors
    from axattn.planning.advice import advice
    from axattn.planning.diagnosis import diagnose
    from axattn.spec import names

    with user_errors(as_json):
        wanted = names.canonicalise(require) if require else ""
        found = diagnose()
        given = advice(found.environment, nvidia_driver=Path("/proc/driver/nvidia").exists())
    lacking = _lacking(wanted, found)
    if as_json:
        value = found.to_dict() | {"advice": [asdict(one) for one in given]}
        print_json(value | ({} if lacking is None else {"error": described(lacking)}))
    else:
        _print_table(found)
        _print_advice(given)
    if lacking is not None:
        typer.echo(f"axattn: {lacking}", err=True)
        raise typer.Exit(1)


def _lacking(wanted: str, found: Diagnosis) -> AxattnError | None:
    """Why the required kernel can't run here, None if it can."""
    from axattn.errors import AxattnError, RegistrationError

    if not wanted or wanted == "auto":
        return None
    try:
        from axattn.planning.planner import require_available  # needs torch

        require_available(wanted, found.environment)
    except AxattnError as error:
        return error
    held = [
        reason
        for kernel in found.kernels
        if kernel.name == wanted
        for reason in kernel.reasons
        if reason.feature == "name"
    ]
    return RegistrationError(f"axattn's {wanted} can't be loaded in this process", held) if held else None


def _print_table(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.text import Text

    from axattn.spec.names import WITHOUT_A_CACHE
    from axattn.tools.rows import Rows

    console = Console()
    libraries = ", ".join(f"{name} {version}" for name, version in found.environment.libraries.items())
    console.print(f"[bold]{found.environment.describe()}[/bold]; Python {found.environment.python}; {libraries}")
    table = Rows("kernel", "runs here", "exact", "packs", reason="why not, and the fix; notes")
    for kernel in found.kernels:
        why = "\n".join(r.text + (f"\n  → {r.fix}" if r.fix else "") for r in kernel.reasons) or kernel.notice
        if kernel.hub:
            why = f"as the hub kernel {kernel.hub}, for whole models only: its library is not installed"
        runs = Text("yes", "green") if kernel.usable else Text("no", "red")
        table.add(kernel.name, runs, "yes" if kernel.exact else "lossy", kernel.packing, reason=why)
    console.print(table)
    console.print(
        f"packs without a cache: {WITHOUT_A_CACHE}. axolotl's flag attn_supports_packing: "
        f"no for {', '.join(kernel.name for kernel in found.kernels if not kernel.packs)}; yes for the others."
    )
    if found.not_autoloaded:
        console.print("Processes register axattn's names only once they import axattn, since:")
        for reason in found.not_autoloaded:
            console.print(f"  {reason.text}\n  → {reason.fix}", markup=False)
    else:
        console.print(
            "Every process that imports torch registers axattn's names with Transformers (off: AXATTN_AUTOLOAD=0)."
        )
    broken = [finding for finding in found.contracts if finding.different]
    console.print(f"{len(found.contracts) - len(broken)} of {len(found.contracts)} contracts with other packages hold.")
    for finding in broken:
        cost = f"{finding.contract.refused} are refused" if finding.contract.refused else "nothing is refused"
        console.print(f"[red]{finding.text}[/red] ({cost}; used by {', '.join(finding.contract.users)})")


def _print_advice(given: Sequence[Advice]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text("\nWhat would gain most here:", style="bold"))
    for one in given:
        console.print(Text(f"  {one.command}", style="bold"))
        console.print(Text(f"    {one.gain}"))
