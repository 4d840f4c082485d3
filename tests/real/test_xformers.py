"""What axattn's record of xformers says, against the library's own dispatch and signatures."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from axattn.backends import get
from axattn.machine.presets import machine
from axattn.spec.capability import Need, missing
from tests.environments import machine as environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None, reason="xformers has no wheel for this platform"
)


@pytest.mark.nightly
def test_the_library_has_an_operator_for_every_call_that_the_record_serves() -> None:
    """Every pair of features, on an architecture of each kind; `make nightly` asks all."""
    machines = ["sm75", "sm90"]
    command = [sys.executable, "-m", "tests.real.xformers_dispatch", "--thin", "2", "--machines", *machines]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 0, f"{found.stdout[-4000:]}\n{found.stderr[-4000:]}"
    asked = int(found.stdout.split()[0])
    assert asked > 200, found.stdout


def test_the_fake_has_the_signature_of_the_library() -> None:
    import xformers.ops

    from tests.fakes import xformers as fake

    real, faked = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (xformers.ops.memory_efficient_attention, fake.memory_efficient_attention)
    )
    assert faked == real


def test_the_range_of_flash_attn_is_the_library_s() -> None:
    from axattn.backends import xformers

    source = Path(importlib.util.find_spec("xformers").origin).parent / "ops" / "fmha" / "flash.py"  # type: ignore
    found = re.findall(r'FLASH_VER_(?:MIN|LAST) = parse_version\("(.*)"\)', source.read_text(encoding="utf-8"))
    assert tuple(map(Version, found)) == xformers._FLASH_ATTN
    assert f'"{xformers._UNCHECKED}", "0") != "1"' in source.read_text(encoding="utf-8")


def test_a_flash_attn_of_another_version_is_taken_where_the_user_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = environment("cuda", 90, flash_attn="2.9.0")
    assert any("it takes" in reason.text for reason in get("xformers").probe(newer))
    monkeypatch.setenv("XFORMERS_IGNORE_FLASH_VERSION_CHECK", "1")
    assert get("xformers").probe(newer) == []


@pytest.mark.parametrize(
    ("name", "need", "text"),
    [
        ("sm75", Need(dtype="bfloat16"), "bfloat16 (xformers serves float16, float32)"),
        ("sm75", Need(window=64, gradient=True, dtype="float16"), "window in training (xformers has no backward"),
        ("sm75", Need(window=64, dtype="float16"), ""),
        ("sm75", Need(window=64, causal=False, dtype="float16"), "window with bidirectional attention (xformers"),
        ("sm80", Need(head_dim=512, gradient=True, dtype="bfloat16"), ""),
        (
            "sm80",
            Need(head_dim=512, window=64, gradient=True, dtype="bfloat16"),
            "window in training, bfloat16, head_dim",
        ),
        ("sm80", Need(window=64, causal=False, gradient=True, dtype="bfloat16"), ""),
        ("sm80", Need(window=64, causal=False, dtype="float32"), "window with bidirectional attention, float32"),
        ("sm90", Need(window=64, gradient=True, dtype="float32"), "window in training, float32"),
        ("sm90", Need(head_dim=256, dropout=0.1, gradient=True, dtype="float16"), ""),
        (
            "sm89",
            Need(head_dim=208, dropout=0.1, gradient=True, dtype="float16"),
            "dropout in training, float16, head_dim=208",
        ),
        ("sm89", Need(head_dim=208, dropout=0.1, gradient=True, dtype="float32"), ""),
        ("sm100", Need(head_dim=208, dropout=0.1, gradient=True, dtype="float16"), ""),
        ("sm100", Need(dtype="float32"), "float32 (xformers serves bfloat16, float16)"),
        ("sm120", Need(head_dim=512, dtype="bfloat16"), "head_dim=512 (xformers serves up to 256)"),
    ],
)
def test_what_is_refused_on_a_machine_is_reported(name: str, need: Need, text: str) -> None:
    reasons = missing(need, get("xformers").capability_on(machine(name)), "xformers")
    assert [text in reason.text for reason in reasons] == ([True] if text else [])
