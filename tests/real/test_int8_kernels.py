"""axattn's INT8 kernels fit the chips that they are offered on: some are compiled here, all by ``AXATTN_REAL=all``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from axattn.kernels.int8_attention import shared_memory
from axattn.machine.presets import NAMES, machine

ALL = os.environ.get("AXATTN_REAL") == "all"


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here (Linux on x86_64 has it)")
def test_shared_memory_and_registers_are_enough() -> None:
    command = [sys.executable, "-m", "tests.real.int8_kernels", *(["--all"] if ALL else [])]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("registers") >= 2


def test_what_a_block_may_have() -> None:
    """From CUDA's programming guide; newer chips of a generation have what its first has."""
    wanted = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
    assert {sm: shared_memory(sm) for sm in wanted} == wanted
    known = {environment.sm for environment in map(machine, NAMES) if environment.sm is not None}
    assert known <= set(wanted)
