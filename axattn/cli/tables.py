"""Tables for people, made with rich."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from axattn.plans import Plan


def plan_table(plan: Plan) -> Table:
    """Groups of equal layers → kernel, and for each kernel not taken, the reason."""
    table = Table("layers", "kind", "needs", "asked", "kernel", "not taken, because", title=f"Plan for {plan.model}")
    for members, first in plan.groups():
        need = first.layer.need
        shown = [f"{need.heads} heads" + (f" / {need.kv_heads} KV" if need.kv_heads != need.heads else "")]
        shown.append(f"D {need.head_dim}" + (f", Dv {need.value_dim}" if need.value_dim != need.head_dim else ""))
        shown += [f"{k} {v}" for k in ("window", "chunk", "softcap") if (v := getattr(need, k)) is not None]
        shown += [k for k in ("sinks", "bias", "sparse") if getattr(need, k)]
        numbers = [entry.layer.index for entry in members]
        label = f"{numbers[0]}-{numbers[-1]}" if _consecutive(numbers) else ", ".join(map(str, numbers))
        path = f"{first.layer.path} " if first.layer.path else ""
        why = "\n".join(f"{r.backend}: {'; '.join(reason.text for reason in r.reasons)}" for r in first.rejected)
        table.add_row(path + label, first.layer.kind, ", ".join(shown), first.asked, first.chosen, why or "-")
    return table


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan with its notes."""
    console = console or Console()
    console.print(plan_table(plan))
    for path in plan.unknown:
        console.print(f"{path or 'The model'}: its config tells nothing about attention; checked call by call.")
    for note in plan.notes:
        console.print(note)


def _consecutive(numbers: list[int]) -> bool:
    return len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
