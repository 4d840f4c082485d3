"""Plots: what is written on them, and that the files are the same from the same numbers."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from axattn.tools import plotting
from benchmarks import page


def texts(figure: Any) -> list[str]:
    """Every text on a figure that a reader sees."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def require_plain(found: list[str]) -> None:
    for text in found:
        assert "$" not in text, text  # matplotlib's powers are math text
        assert "^" not in text, text
        assert not re.search(r"\de[+-]?\d", text), text


def test_numbers_are_written_out() -> None:
    assert [plotting.tokens(n) for n in (256, 1024, 1536, 2048, 2000, 32768, 2**20)] == [
        *("256", "1k", "1.5k", "2k", "2k", "32k", "1M")
    ]
    assert [plotting.plain(x) for x in (0, 0.05, 0.0001, 1.5, 7.2846, 125.2, 19955.4, 1e6)] == [
        *("0", "0.05", "0.0001", "1.5", "7.28", "125", "19,955", "1,000,000")
    ]
    assert [plotting.times(x) for x in (0.03, 0.5, 0.98, 1.0, 1.04, 2.87, 17.19, 99.9)] == [
        *("0.03x", "0.5x", "0.98x", "1.00x", "1.04x", "2.9x", "17x", "100x")
    ]


def _contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio of two colours."""
    from matplotlib.colors import to_rgb

    def luminance(colour: str) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [plotting.LIGHT, plotting.DARK])
def test_text_in_every_colour_is_readable(theme: plotting.Theme) -> None:
    for colour in (theme.ink, theme.muted, *theme.series):
        assert _contrast(colour, theme.background) >= 4.5, colour


def test_labels_at_close_ends_do_not_overlap() -> None:
    with plotting.style() as theme:
        figure = plotting.new_figure(5, 3, "Three lines end close to each other")
        axes = figure.subplots()
        ends = [(2.0, 1.0), (2.0, 1.01), (2.0, 1.02)]
        axes.plot([1, 2], [0, 1], color=theme.ink)
        axes.set_ylim(0, 2)
        plotting.end_labels(axes, [(x, y, f"line {y}", theme.ink) for x, y in ends])
        figure.draw_without_rendering()
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 - 1 for below, above in pairwise(boxes))


def test_the_page_of_numbers_plot_states_its_finding_in_plain_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plotting.style(plotting.DARK):
        found = texts(page.drawn(plotting.DARK))
    require_plain(found)
    shown = " ".join(found)
    assert {"2k", "32k"} <= set(found)
    assert re.search(r"is \S+x as fast on varlen as on sdpa", shown)
    assert re.search(r"sdpa \(\S+x\)\n\S+ MiB", shown)
    committed = page.PLOT.with_suffix(".svg").read_text()
    monkeypatch.setattr(page, "PLOT", tmp_path / "performance.png")
    page.plot()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("performance.png", "performance.svg", "performance-dark.svg")
    }
    first = (tmp_path / "performance.svg").read_bytes()
    page.plot()
    assert (tmp_path / "performance.svg").read_bytes() == first
    assert "<svg" in committed
    assert (tmp_path / "performance.png").read_bytes().startswith(b"\x89PNG")


def test_the_spread_of_the_page_of_numbers_is_drawn_where_it_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads((page.RESULTS / "cpu.json").read_text())
    for name in ("varlen", "sdpa"):
        found["results"]["linear"][name]["seconds_largest"] = [
            1.5 * value for value in found["results"]["linear"][name]["seconds"]
        ]
    (tmp_path / "cpu.json").write_text(json.dumps(found))
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    with plotting.style():
        seconds, memory = page.drawn(plotting.LIGHT).axes
    assert [len(axes.collections) for axes in (seconds, memory)] == [2, 0]
