"""The plot of the demo's losses: a smoothed line over the raw dots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from axattn.tools import plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDS = 5
"""Steps whose mean is the loss at the start and at the end."""


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """The loss at the start and at the end, each a mean of `ENDS` steps."""
    first, last = losses[:ENDS], losses[-ENDS:]
    return sum(first) / len(first), sum(last) / len(last)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over a tenth of the steps around each; fewer near the ends, where as many lie before as after."""
    reach = max(len(losses) // 20, 1)
    found = []
    for at in range(len(losses)):
        near = min(reach, at, len(losses) - 1 - at)
        around = losses[at - near : at + near + 1]
        found.append(sum(around) / len(around))
    return found


def drawn(losses: Sequence[float], theme: plotting.Theme = plotting.LIGHT) -> Figure:
    """The plot, within `plotting.style`."""
    from matplotlib.ticker import MaxNLocator

    start, end = ends(losses)
    verb = "falls" if end < start else "rises"
    figure = plotting.new_figure(7, 4, f"Loss {verb} from {start:.2f} to {end:.2f} in {len(losses)} packed steps")
    axes, colour, steps = figure.subplots(), theme.series[0], range(1, len(losses) + 1)
    axes.plot(steps, losses, ".", color=theme.muted, alpha=0.6, markersize=4)
    axes.plot(steps, smoothed(losses), color=colour)
    axes.set(xlabel="step", title="nats per token; dots: each step, line: smoothed")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label = f"{end:.2f}\n({plotting.times(end / start)})"
    plotting.end_labels(axes, [(len(losses), smoothed(losses)[-1], label, colour)])
    return figure


def plot(losses: Sequence[float], path: Path) -> None:
    """Write `drawn` to a file."""
    with plotting.style():
        plotting.save(drawn(losses), path)
