"""The style of every plot: a title that states the finding, plain units, labels at the lines; no measurements.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), darkened or lightened until text in them has a
contrast of 4.5 to the background (WCAG 2.1), on light and on dark.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200
"""Pixels per inch of a PNG: twice matplotlib's 100, for screens with two pixels per point."""
MARKERS = ("o", "s", "D", "^", "v", "P")


class Theme(NamedTuple):
    """Colours of a background.

    Attributes:
        background: behind everything; plots are opaque, so that they stay readable on any page.
        ink: text.
        muted: axes, and the baseline that others are compared with.
        grid: lines of the grid.
        series: one per line, distinct for colour-blind readers.
    """

    background: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1f2328", "#59636e", "#e4e7eb", ("#0072b2", "#b34a00", "#007a5a", "#a0497b", "#826000", "#2f4b9b")
)
DARK = Theme(
    "#0d1117", "#e6edf3", "#9198a1", "#262c36", ("#56b4e9", "#f08a4b", "#2fc39b", "#e29ac2", "#e6b422", "#a3b3f0")
)


@contextlib.contextmanager
def style(theme: Theme = LIGHT) -> Iterator[Theme]:
    """Matplotlib's settings inside the block; figures must be made and saved within it."""
    import matplotlib

    settings = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "figure.titlesize": 12,
        "figure.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "lines.linewidth": 2,
        "lines.markersize": 5,
        "savefig.dpi": DPI,
        "svg.hashsalt": "axattn",  # the same file from the same numbers
    }
    with matplotlib.rc_context(settings):
        yield theme


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure (inches) titled with its finding, wrapped to the width. Needs no display."""
    import textwrap

    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * 10.5))), x=0.01, ha="left")
    return figure


def save(figure: Figure, *paths: Path) -> None:
    """Write a figure to files, each in the format of its suffix (``.png``, ``.svg``), without dates or versions."""
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=metadata)


def tokens(count: float) -> str:
    """A number of tokens: ``512``, ``2k`` (2,048 or 2,000), ``1.5k``, ``1M``."""
    step = 1000 if count % 1000 == 0 or count % 512 else 1024
    for unit, text in ((step * step, "M"), (step, "k")):
        if count >= unit:
            return plain(count / unit) + text
    return plain(count)


def plain(value: float) -> str:
    """Three digits, never with an exponent: ``0.05``, ``1.5``, ``19,955``."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def times(ratio: float) -> str:
    """A factor: ``17x``, ``2.9x``, ``1.04x``."""
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.2g}x" if not 0.95 < ratio < 1.095 else f"{ratio:.2f}x"


def log_axis(axis: Any, at: Sequence[float] | None = None, text: Any = plain) -> None:
    """Make an axis (``axes.xaxis`` or ``axes.yaxis``) logarithmic, with ticks at these values (else 1, 2, 5, 10, ...
    or fewer within the limits) written out, and no ticks between them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axes, name = axis.axes, axis.axis_name
    getattr(axes, f"set_{name}scale")("log")
    if at is None:
        low, high = getattr(axes, f"get_{name}lim")()
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            at = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
            if len(at) <= 8:
                break
    axis.set_major_locator(FixedLocator(list(at or ())))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def end_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) to the right of the ends of lines, moved apart where they would overlap.

    The limits of the axes must be final.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    points = 72 / figure.dpi
    last = -math.inf
    for x, y, text, colour in sorted(labels, key=lambda label: axes.transData.transform(label[:2])[1]):
        at = axes.transData.transform((x, y))[1] * points
        height = 13.0 * (1 + text.count("\n"))
        middle = max(at, last + height / 2)
        last = middle + height / 2
        axes.annotate(
            text,
            (x, y),
            (8, middle - at),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
