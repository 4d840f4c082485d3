"""Plots a benchmark (PNG), reads its file, and compares two files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axattn.errors import InvalidConfigError, Reason


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Plot bars per kernel and shape: times relative to ``sdpa``. `found` is from `Bench.to_dict`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = found["shapes"]
    names = list(dict.fromkeys(k["kernel"] for shape in shapes for k in shape["kernels"] if not k["failed"]))
    figure, axes = plt.subplots(figsize=(max(6, 2.4 * len(shapes)), 4), layout="constrained")
    width = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        heights = [_ratio(shape, name) for shape in shapes]
        axes.bar([at + number * width for at in range(len(shapes))], heights, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(
        [at + 0.4 - width / 2 for at in range(len(shapes))], [shape["label"] for shape in shapes], fontsize=7
    )
    axes.set_ylabel("time / time of sdpa (lower is faster)")
    axes.set_title(f"forward{' and backward' if found['backward'] else ''}, {found['dtype']}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _ratio(shape: Mapping[str, Any], name: str) -> float:
    found = next((k["ratio"] for k in shape["kernels"] if k["kernel"] == name), None)
    return math.nan if found is None else float(found)


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
