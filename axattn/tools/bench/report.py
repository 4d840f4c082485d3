"""Sorts and plots a benchmark (PNG, SVG), reads its file, and compares two files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axattn.errors import InvalidConfigError, Reason
from axattn.tools import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE = "sdpa"


def by_speed(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Kernels of a shape, or names of steps, fastest first; those that failed last."""
    return sorted(entries, key=lambda one: math.inf if one.get("failed") or not one["ratio"] else one["ratio"])


def name_of(entry: Mapping[str, Any]) -> str:
    """The name of a kernel of a shape, or of a step."""
    return str(entry.get("kernel") or entry["name"])


def against_sdpa(entry: Mapping[str, Any]) -> str:
    """An entry's ratio in words, with its quartiles: ``2.9x as fast (2.7x to 3.1x)``."""
    low, middle, high = (1 / float(entry.get(key) or entry["ratio"]) for key in ("ratio_high", "ratio", "ratio_low"))
    if name_of(entry) == BASE:
        return "the baseline"
    spread = "" if low == high else f" ({plotting.times(low)} to {plotting.times(high)})"
    return f"{plotting.times(middle)} as fast{spread}"


def finding(found: Mapping[str, Any]) -> str:
    """What a benchmark found, as a title. A kernel counts as faster only if the quartiles of its ratios agree."""
    groups = [shape["kernels"] for shape in found["shapes"]] if "shapes" in found else [found["steps"]]
    what = "a training step" if "steps" in found else f"attention{' with backward' if found['backward'] else ''}"
    best: dict[str, list[float]] = {}
    for group in groups:
        first = by_speed(group)[0]
        faster = not first.get("failed") and first["ratio"] and (first.get("ratio_high") or first["ratio"]) < 1
        if faster and name_of(first) != BASE:
            best.setdefault(name_of(first), []).append(1 / first["ratio"])
    if not best:
        return f"No kernel is faster than {BASE} in {what} here"
    name = max(best, key=lambda one: (len(best[one]), max(best[one])))
    most = plotting.times(max(best[name]))
    where = f" on {len(best[name])} of {len(groups)} shapes, up to" if len(groups) > 1 else ":"
    return f"{name} is the fastest in {what}{where} {most} as fast as {BASE}"


def drawn(found: Mapping[str, Any], theme: plotting.Theme = plotting.LIGHT) -> Figure:
    """A row of panels per shape (or one of whole steps): kernels sorted, times relative to ``sdpa`` with quartiles, and
    memory beside them where it was measured. `found` is from `Bench.to_dict`. Within `plotting.style`."""
    if "shapes" in found:
        panels = [(f"{shape['label']}, {found['dtype']}", shape["kernels"]) for shape in found["shapes"]]
    else:
        label = f"{found['model']}, {plotting.tokens(found['tokens'])} tokens in {found['documents']} documents"
        panels = [(label, found["steps"])]
    panels = [(label, [one for one in by_speed(entries) if not one.get("failed")]) for label, entries in panels]
    memory = any(one.get("peak_bytes") is not None for _, entries in panels for one in entries)
    sizes = [0.9 + 0.36 * max(len(entries), 1) for _, entries in panels]
    figure = plotting.new_figure(10 if memory else 8, 0.6 + sum(sizes), finding(found))
    ratios = [2, 1] if memory else [1]
    grid = figure.subplots(len(panels), len(ratios), squeeze=False, width_ratios=ratios, height_ratios=sizes)
    names = sorted({name_of(one) for _, entries in panels for one in entries} - {BASE})
    colours = dict(zip(names, itertools.cycle(theme.series), strict=False)) | {BASE: theme.muted}
    for row, (label, entries) in zip(grid, panels, strict=True):
        _draw_ratios(row[0], label, entries, colours, theme)
        if memory:
            _draw_memory(row[1], entries, colours)
    grid[-1][0].set_xlabel(f"time / time of {BASE} (shorter is faster; whiskers: quartiles of the rounds)")
    if memory:
        grid[-1][1].set_xlabel("peak memory, MiB")
    return figure


def _draw_ratios(
    axes: Axes, label: str, entries: Sequence[Mapping[str, Any]], colours: Mapping[str, str], theme: plotting.Theme
) -> None:
    for at, entry in enumerate(entries):
        ratio, colour = float(entry["ratio"] or math.nan), colours[name_of(entry)]
        low, high = (float(entry.get(key) or ratio) for key in ("ratio_low", "ratio_high"))
        axes.barh(at, ratio, height=0.55, color=colour, alpha=0.45)
        axes.errorbar(ratio, at, xerr=[[ratio - low], [high - ratio]], color=colour, capsize=4, fmt="none")
        speed = f", {entry['tokens_per_s']:,} tokens/s" if "tokens_per_s" in entry else ""
        behind = {"facecolor": theme.background, "edgecolor": "none", "pad": 1.0}  # the line of the baseline
        axes.annotate(
            against_sdpa(entry) + speed if entry["ratio"] else "no ratio",
            (high, at),
            (8, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            fontweight="bold",
            color=colour,
            bbox=behind,
        )
    axes.axvline(1.0, color=theme.muted, linewidth=1, linestyle="--")
    _name_rows(axes, entries)
    axes.set(title=label, xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: plotting.plain(value))


def _draw_memory(axes: Axes, entries: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    for at, entry in enumerate(entries):
        if (peak := entry.get("peak_bytes")) is not None:
            axes.barh(at, peak / 2**20, height=0.55, color=colours[name_of(entry)], alpha=0.45)
            text = f"{plotting.plain(peak / 2**20)} MiB"
            axes.annotate(text, (peak / 2**20, at), (6, 0), textcoords="offset points", va="center")
    _name_rows(axes, ())
    axes.xaxis.set_major_formatter(lambda value, _: plotting.plain(value))
    axes.set(ylim=(len(entries) - 0.4, -0.6), xlim=(0, None))
    axes.locator_params(axis="x", nbins=4)


def _name_rows(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    axes.set_yticks(range(len(entries)), [name_of(entry) for entry in entries])
    axes.set_ylim(max(len(entries), 1) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Write `drawn` as a PNG to `path` and as an SVG beside it."""
    with plotting.style():
        plotting.save(drawn(found), path, path.with_suffix(".svg"))


def read(path: Path) -> dict[str, Any]:
    """Read a file that ``axattn bench --json`` or ``--output`` wrote.

    Raises:
        InvalidConfigError: it is not such a file.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["shapes"], list):
            raise TypeError("shapes is not a list")
        for shape in found["shapes"]:
            for kernel in shape["kernels"]:
                float(kernel["ratio"] or 0), str(shape["label"]), str(kernel["kernel"])
    except (ValueError, KeyError, TypeError) as error:
        reason = Reason("file", f"{type(error).__name__}: {error}")
        raise InvalidConfigError(f"{path.name} is not a benchmark of axattn", [reason]) from error
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For kernels and shapes in both: the ratio to ``sdpa`` before and after, and their quotient (below 1: faster).

    Ratios, not times, because the two runs may have had different machine loads.
    """
    known = {(s["label"], k["kernel"]): k["ratio"] for s in before["shapes"] for k in s["kernels"]}
    found = []
    for shape in after["shapes"]:
        for kernel in shape["kernels"]:
            old, new = known.get((shape["label"], kernel["kernel"])), kernel["ratio"]
            if old and new:
                entry = {"shape": shape["label"], "kernel": kernel["kernel"], "before": old, "after": new}
                found.append({**entry, "change": round(new / old, 4)})
    return found
