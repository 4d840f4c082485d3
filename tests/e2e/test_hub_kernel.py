"""The hub kernel (`hub_kernel`) in Transformers alone: a process of its own in which axattn does not exist.

On a CPU, in Triton's interpreter. Where Transformers takes the installed ``kernels``, that loads it through
``LOCAL_KERNELS`` (the oldest of the two that the tests run on), a stand-in elsewhere; all else is Transformers' own.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import is_kernels_available

from hub_kernel.make import make
from tests.interpreter import INTERPRETED

ROOT = Path(__file__).resolve().parents[2]
CHECKS = [  # not imported: it makes axattn absent
    node.name
    for node in ast.parse((ROOT / "tests" / "hub_kernel_jobs.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and any(ast.unparse(mark) == "check" for mark in node.decorator_list)
]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.xdist_group("hub-kernel"),  # one process for all
    pytest.mark.skipif(
        not INTERPRETED, reason="Triton's interpreter is off (no triton from 3.7 on, or a GPU is there)"
    ),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hub-kernel")
    environment = {
        **os.environ,
        "LOCAL_KERNELS": f"axattn/int8-flash-attn={make(folder)}",
        "HF_HUB_OFFLINE": "1",
        "WORK": str(folder),
        "TRITON_INTERPRET": "1",
        "AXATTN_AUTOLOAD": "0",
        "PYTHONPATH": str(ROOT),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "tests.hub_kernel_jobs"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_in_transformers_alone(done: dict[str, Any], check: str) -> None:
    assert done["results"][check] == ""


def test_no_check_is_left_out(done: dict[str, Any]) -> None:
    assert set(done["results"]) == set(CHECKS)


def test_kernels_loads_it_where_transformers_takes_it(done: dict[str, Any]) -> None:
    assert done["loaded_by"].startswith("kernels " if is_kernels_available() else "a stand-in")
