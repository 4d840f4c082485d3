"""The main job itself, shorter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from axattn.cli import app
from axattn.tools.demo import job
from axattn.tools.demo.corpus import documents
from axattn.tools.demo.proof import Proof

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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "ROW", 192)
    monkeypatch.setattr(job, "BATCH", 4)
    monkeypatch.setattr(job, "documents", lambda: [text for text in documents(400) if len(text) < 600])
    arguments = ["demo", "--steps", str(STEPS), "--output", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = _require_a_whole_report(tmp_path)
    assert report["packing"]["documents"] >= STEPS * 4
    assert json.loads(done.stdout) == report
    assert str(tmp_path) in done.stderr.replace("\n", "")


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
