"""The main job itself, shorter."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from axattn.cli import app
from axattn.tools import plotting
from axattn.tools.demo import job
from axattn.tools.demo.announcement import WRITES, seconds
from axattn.tools.demo.corpus import documents
from axattn.tools.demo.loss import drawn, ends, smoothed
from axattn.tools.demo.proof import Proof
from tests.tools.test_plotting import require_plain, texts

STEPS = 12


def _require_a_whole_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert len(report["losses"]) == STEPS
    assert len(report["proofs"]) == 5
    assert all(proof["holds"] for proof in report["proofs"])
    assert {layer["chosen"] for layer in report["plan"]["layers"]} == {"varlen"}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "model" / "model.safetensors").exists()
    assert str(folder) not in json.dumps(report)
    return report


def test_the_demo_on_short_rows_runs_proves_and_leaves_its_report(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(job, "ROW", 192)
    monkeypatch.setattr(job, "BATCH", 4)
    short = [text for text in documents(400) if len(text) < 600]
    monkeypatch.setattr(job, "documents", lambda progress: short)
    arguments = ["demo", "--steps", str(STEPS), "--output", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = _require_a_whole_report(tmp_path)
    assert report["packing"]["documents"] >= STEPS * 4
    assert json.loads(done.stdout) == report
    assert str(tmp_path) in done.stderr.replace("\n", "")
    assert {path.name for path in tmp_path.iterdir()} == set(WRITES)
    assert list(scratch.iterdir()) == []


def test_the_demo_says_first_what_it_will_do_and_imports_nothing_heavy_before(tmp_path: Path) -> None:
    """The process ends at the first import of torch or Transformers."""
    code = (
        "import sys\n"
        "class Ends:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'transformers'): raise SystemExit(99)\n"
        "import axattn.cli\n"
        "sys.meta_path.insert(0, Ends())\n"
        f"sys.argv = ['axattn', 'demo', '--steps', '50', '--output', {str(tmp_path / 'out')!r}, *sys.argv[1:]]\n"
        "axattn.cli.main()\n"
    )
    for more, stream in (([], "stdout"), (["--json"], "stderr")):
        done = subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 99, done.stderr
        said = getattr(done, stream)
        assert "50 steps" in said
        assert re.search(r"about \d+ minutes? on \d+ idle CPU core", said)
        for name in WRITES:
            assert name in said
    assert not (tmp_path / "out").exists()


def test_more_steps_take_longer_and_more_cores_less() -> None:
    assert seconds(200, 2) == pytest.approx(165, abs=5)  # as measured
    assert seconds(400, 2) > seconds(200, 2) > seconds(200, 4) > seconds(200, 8) == seconds(200, 64)


def test_building_the_corpus_shows_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "documents", lambda progress: documents(120, progress))
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        texts, _, examples = job.build_corpus(console)
        assert len(texts) == len(examples) == 120
        shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
        assert ("tokenising" in shown) is terminal


def test_the_loss_is_smoothed_over_its_dots_and_the_title_says_what_happened() -> None:
    falling = [8 - at / 50 + (-1) ** at * 0.3 for at in range(200)]
    line = smoothed(falling)
    assert len(line) == 200
    jumps = [max(abs(a - b) for a, b in pairwise(each[15:-15])) for each in (line, falling)]
    assert jumps[0] < 0.1
    assert jumps[1] > 0.5
    assert smoothed([3.0, 2.0]) == [3.0, 2.0]
    with plotting.style():
        figure = drawn(falling)
        found = texts(figure)
        up = texts(drawn([1.0, 2.0]))
    require_plain(found)
    start, end = ends(falling)
    assert f"Loss falls from {start:.2f} to {end:.2f} in 200 packed steps" in found
    assert f"{end:.2f}\n({plotting.times(end / start)})" in found
    assert any(text.startswith("Loss rises from") for text in up)
    assert [len(one.get_xdata()) for one in figure.axes[0].get_lines()] == [200, 200]


@pytest.mark.slow
@pytest.mark.nightly
def test_the_demo_runs_proves_and_leaves_its_report(tmp_path: Path) -> None:
    demo = ["demo", "--steps", str(STEPS), "--output", str(tmp_path), "--json"]
    command = [sys.executable, "-c", "from axattn.cli import main; main()", *demo]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = _require_a_whole_report(tmp_path)
    assert report["packing"]["documents"] >= STEPS * 16  # the loader fetches a batch ahead
    assert json.loads(done.stdout) == report
    assert str(tmp_path) in done.stderr.replace("\n", "")


def test_the_corpus_is_real_text_in_a_fixed_order() -> None:
    texts = documents(50)
    assert len(texts) == 50
    assert texts == documents(50)
    assert all(text.startswith(("def ", "async def ")) for text in texts)
    for text in texts:
        compile(text, "document", "exec")


def test_a_proof_holds_up_to_its_limit() -> None:
    assert Proof("", 1e-6, 1e-5).holds
    assert not Proof("", 1e-4, 1e-5).holds
    assert not Proof("", float("nan"), 1e-5).holds
