"""Terminal tables of plans, with rich."""

from __future__ import annotations

from rich.console import Console

from axattn.planning.alternatives import alternatives
from axattn.planning.estimates import Estimate, computed_flops, estimate, total
from axattn.planning.plan import LayerPlan, Plan
from axattn.tools.axolotl.config import COMPUTED, AttentionConfig
from axattn.tools.rows import Rows

LENGTH = 4096
"""Tokens of the row whose costs are shown if no length is given."""


def plan_table(plan: Plan, seq_len: int = 0) -> Rows:
    """A row per group of equal layers: its kernel, what it costs in a row of this length (0 for `LENGTH`), and the
    reason and the cost of each alternative."""
    length = seq_len or LENGTH
    title = f"Plan for {plan.model} on {plan.environment.describe()}"
    reason = f"cost of a forward at {length:,} tokens, and memory of a mask or weights; why not the others"
    rows = Rows("layers", "kernel", "requested", "kind", "needs", reason=reason, title=title)
    for members, first in plan.groups():
        need = first.layer.need
        shown = [f"{need.heads} heads" + (f" / {need.kv_heads} KV" if need.kv_heads != need.heads else "")]
        shown.append(f"D {need.head_dim}" + (f", Dv {need.value_dim}" if need.value_dim != need.head_dim else ""))
        shown += [f"{k} {v}" for k in ("window", "chunk", "softcap") if (v := getattr(need, k)) is not None]
        shown += [k for k in ("sinks", "bias", "sparse") if getattr(need, k)]
        numbers = [entry.layer.index for entry in members]
        label = f"{numbers[0]}-{numbers[-1]}" if _consecutive(numbers) else ", ".join(map(str, numbers))
        path = f"{first.layer.path} " if first.layer.path else ""
        cells = (path + label, first.chosen, first.asked, first.layer.kind, ", ".join(shown))
        rows.add(*cells, reason="\n".join(_reasons(plan, first, length)))
    return rows


def _reasons(plan: Plan, entry: LayerPlan, length: int) -> list[str]:
    own = estimate(entry, length)
    cost = _work(computed_flops(entry, length), own.extra_bytes)
    lines = [f"{entry.chosen}, {cost}: chosen; {_bytes(own.kv_bytes)} of keys and values"]
    for other in alternatives(entry, plan.environment, length):
        why = ("ranks lower: " if other.serves else "") + "; ".join(other.reasons)
        lines.append(f"{other.backend}, {_work(other.flops, other.extra_bytes)}: {why}")
    return lines


def _work(flops: int, extra: int) -> str:
    return f"{_flops(flops)} and {_bytes(extra)}" if extra else _flops(flops)


def _cost(value: Estimate) -> str:
    text = f"{_flops(value.flops)} forward, {_bytes(value.kv_bytes)} of keys and values"
    return text + (f", {_bytes(value.extra_bytes)} of mask or weights" if value.extra_bytes else "")


def _flops(count: float) -> str:
    for unit in ("MFLOP", "GFLOP"):
        count /= 1000 if unit == "GFLOP" else 1e6
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:,.4g} TFLOP"


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
