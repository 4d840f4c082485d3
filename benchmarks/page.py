"""Makes docs/performance.md, its plots and README's table from the committed results: ``python -m benchmarks.page``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from axattn.tools import plotting
from benchmarks.measure import ROOT

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance.png"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by python -m benchmarks.page -->\n", "<!-- end -->"


def rendered(template: str) -> str:
    """A template of this folder over the committed results."""
    found = json.loads((RESULTS / "cpu.json").read_text())
    gpus = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("gpu*.json"))]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.ChainableUndefined, keep_trailing_newline=True
    )
    return environment.get_template(template).render(r=found["results"], machine=found["machine"], gpus=gpus)


def page() -> str:
    """The whole page."""
    return rendered("performance.md.j2")


def readme(text: str) -> str:
    """README with its table made again."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{rendered('readme.md.j2')}{END}{after}"


def finding(linear: dict[str, Any]) -> str:
    """The title of the plot: how far apart the names are at the longest row."""
    varlen, base = linear["varlen"], linear["sdpa"]
    faster, smaller = (base[key][-1] / varlen[key][-1] for key in ("seconds", "peak_mib"))
    return (
        f"A packed step of {plotting.tokens(linear['tokens'][-1])} tokens is {plotting.times(faster)} as fast "
        f"on varlen as on sdpa, in 1/{smaller:.2g} of the memory"
    )


def drawn(theme: plotting.Theme) -> Figure:
    """Time and memory of a packed step against its tokens, both names, log-log. Within `plotting.style`."""
    linear: dict[str, Any] = json.loads((RESULTS / "cpu.json").read_text())["results"]["linear"]
    sizes, varlen, base = linear["tokens"], linear["varlen"], linear["sdpa"]
    figure = plotting.new_figure(9.5, 3.9, finding(linear))
    panels = (("seconds", "seconds per step, best of up to three", "s"), ("peak_mib", "peak memory, MiB", "MiB"))
    for axes, (key, label, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        labels = []
        for name, found, colour, marker in (("varlen", varlen, theme.series[0], "o"), ("sdpa", base, theme.muted, "s")):
            axes.plot(sizes, found[key], marker=marker, color=colour)
            slowest = found.get(f"{key}_largest")
            if slowest is not None:
                axes.fill_between(sizes, found[key], slowest, color=colour, alpha=0.2, linewidth=0)
            ratio = f" ({plotting.times(found[key][-1] / varlen[key][-1])})" if name == "sdpa" else ""
            text = f"{name}{ratio}\n{plotting.plain(found[key][-1])} {unit}"
            labels.append((sizes[-1], found[key][-1], text, colour))
        plotting.log_axis(axes.xaxis, sizes, plotting.tokens)
        axes.set_yscale("log")
        plotting.log_axis(axes.yaxis)
        axes.set(xlabel="tokens in the packed row (documents of 256)", title=label)
        plotting.end_labels(axes, labels)
    return figure


def plot() -> None:
    """Write docs/performance.png and .svg, and performance-dark.svg for dark pages."""
    with plotting.style():
        plotting.save(drawn(plotting.LIGHT), PLOT, PLOT.with_suffix(".svg"))
    with plotting.style(plotting.DARK):
        plotting.save(drawn(plotting.DARK), PLOT.with_name(f"{PLOT.stem}-dark.svg"))


def main() -> None:
    """Write everything."""
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
    plot()


if __name__ == "__main__":
    main()
