"""The main job itself, shorter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from axattn.tools.demo.corpus import documents
from axattn.tools.demo.proof import Proof


@pytest.mark.slow
def test_the_demo_runs_proves_and_leaves_its_report(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from axattn.cli import main; main()",
        "demo",
        "--steps",
        "16",
        "--output",
        str(tmp_path),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["losses"]) == 16
    assert len(report["proofs"]) == 5
    assert all(proof["holds"] for proof in report["proofs"])
    assert {layer["chosen"] for layer in report["plan"]["layers"]} == {"varlen"}
    assert report["packing"]["documents"] >= 16 * 16  # the loader fetches a batch ahead
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert json.loads(done.stdout) == report
    assert str(tmp_path) in done.stderr.replace("\n", "")
    assert str(tmp_path) not in json.dumps(report)


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
