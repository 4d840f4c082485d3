"""Makes docs/performance.md, its plot and README's table from the committed results: ``python -m benchmarks.page``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

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


def plot(path: Path) -> None:
    """Time and memory of a packed step against its tokens, both names, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    linear: dict[str, Any] = json.loads((RESULTS / "cpu.json").read_text())["results"]["linear"]
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2))
    for axis, key, label in zip(axes, ("seconds", "peak_mib"), ("seconds", "peak MiB"), strict=True):
        for name, style in (("varlen", "o-"), ("sdpa", "s--")):
            axis.loglog(linear["tokens"], linear[name][key], style, label=name, base=2)
        axis.set_xlabel("tokens of the packed row")
        axis.set_ylabel(label)
        axis.grid(True, which="both", alpha=0.2)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Write everything."""
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
    plot(PLOT)


if __name__ == "__main__":
    main()
