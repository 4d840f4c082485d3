"""Terminal tables of plans, with rich."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from axattn.planning.estimates import Estimate, estimate, total
from axattn.planning.plan import Plan
from axattn.tools.axolotl.config import COMPUTED, AttentionConfig


def plan_table(plan: Plan, seq_len: int = 0) -> Table:
    """A row per group of equal layers: its kernel, the reasons against the others, and with a length a layer's cost."""
    cost = [f"per layer at {seq_len:,}"] if seq_len else []
    columns = ["layers", "kind", "needs", "requested", "kernel", *cost, "why not the others"]
    table = Table(title=f"Plan for {plan.model} on {plan.environment.describe()}")
    for column in columns:
        table.add_column(column, no_wrap=column == "kernel")
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
        cost = [_cost(estimate(first, seq_len))] if seq_len else []
        table.add_row(path + label, first.layer.kind, ", ".join(shown), first.asked, first.chosen, *cost, why or "-")
    return table


def _cost(value: Estimate) -> str:
    text = f"{value.flops / 1e12:.3g} TFLOP forward, {_bytes(value.kv_bytes)} of keys and values"
    return text + (f", {_bytes(value.extra_bytes)} of mask or weights" if value.extra_bytes else "")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def print_plan(
    plan: Plan,
    console: Console | None = None,
    *,
    seq_len: int = 0,
    flags: AttentionConfig | None = None,
    assumed: bool = False,
) -> None:
    """Print a plan with its notes, the cost at a length, the capability flags, and the assumed libraries."""
    console = console or Console()
    console.print(plan_table(plan, seq_len))
    if seq_len:
        console.print(f"All layers, one row of {seq_len:,} tokens in 16 bit: {_cost(total(plan, seq_len))}.")
    if flags is not None:
        console.print(", ".join(f"{name}: {str(getattr(flags, name)).lower()}" for name in COMPUTED))
    if assumed:
        libraries = ", ".join(f"{name} {version}" for name, version in plan.environment.libraries.items())
        console.print(f"Assumed on that machine: {libraries}.")
    for path in plan.unknown:
        console.print(f"{path or 'The model'}: its config does not describe attention; each call is checked.")
    for note in (*plan.notes, *plan.sources):
        console.print(note)


def _consecutive(numbers: list[int]) -> bool:
    return len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
