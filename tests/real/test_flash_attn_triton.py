"""flash-attn 2.8.3's Triton backend for AMD GPUs, in Triton's interpreter: shows that it ignores what axattn's record
refuses there, and that what the record serves is right. In a process of its own: the package has two backends, chosen
when it is imported."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from axattn.machine.presets import machine
from axattn.spec.capability import Need
from tests.interpreter import INTERPRETED
from tests.real.needs import served
from tests.real.packages import EVERYTHING, needs

pytestmark = [
    needs("flash-attn", "einops"),
    pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: triton from 3.7 on, and no GPU"),
    pytest.mark.skipif(not EVERYTHING, reason="a minute: `make real-kernels`"),
]
MACHINE = dataclasses.replace(machine("rocm6"), flash_attn_triton=True)
PLAIN = {"head_dim": 32, "heads": 2, "kv_heads": 2, "dtype": "float16", "device": "cuda"}


def errors(asked: list[Need]) -> list[str]:
    """What the backend gets wrong of each need."""
    variables = {"TRITON_INTERPRET": "1", "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.real.test_flash_attn_triton"],
        input=json.dumps([dataclasses.asdict(need) for need in asked]),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_the_record_refuses_is_ignored() -> None:
    """Window and softcap change nothing, and dropout takes the same weights away in every call."""
    extras: list[dict[str, Any]] = [{"window": 9}, {"softcap": 1.0}, {"dropout": 0.1}, {}]
    *wrong, plain = errors([Need(**PLAIN, **extra) for extra in extras])
    assert not plain
    assert "output is" in wrong[0]
    assert "output is" in wrong[1]
    assert wrong[2] == "the same weights in every call"


def test_what_the_record_serves_is_right() -> None:
    found = [need for need in served("flash_attention_2", MACHINE) if need.value_dim is None]
    assert not any(need.window or need.softcap or need.dropout for need in found)
    asked = [
        dataclasses.replace(need, heads=2, kv_heads=2 if need.heads == need.kv_heads else 1)
        for need in found
        if need.dtype == "float16"  # the interpreter's bfloat16 is off by 1e9, in any kernel of this file
        and (need.head_dim == 32 or (need.head_dim in (80, 256) and need.gradient))
    ]
    wrong = {need: said for need, said in zip(asked, errors(asked), strict=True) if said}
    assert asked
    assert not wrong


def _main() -> None:
    import torch

    from axattn.backends import flash_calls
    from tests.real import calls, loading

    with loading.on_cpu("flash-attn", "einops"):
        import flash_attn

        function = flash_attn.flash_attn_varlen_func
        flash_calls.varlen_function = lambda _: function  # type: ignore[assignment]  # this process has nothing else
        found = []
        for one in json.load(sys.stdin):
            need = Need(**one)
            said = calls.wrong(need, flash_calls.flash_2)
            if need.dropout and not said:
                call = calls.small(need).call
                first, second = flash_calls.flash_2(call), flash_calls.flash_2(call)
                said = "the same weights in every call" if torch.equal(first, second) else ""
            found.append(said)
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
