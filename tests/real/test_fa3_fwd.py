"""fa3-fwd 0.0.3 as released, but for its operator: what axattn's record of fp8 says yes to raises nothing there
and is right (unrounded, as on the fake), and the models of the matrix run on it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from axattn.backends import fp8
from axattn.machine.environment import Environment
from axattn.spec.capability import Need
from tests.conformance import cells, report
from tests.fakes import flash
from tests.fakes.machine import hopper
from tests.real import loading
from tests.real.calls import wrong
from tests.real.needs import served
from tests.real.packages import EVERYTHING, needs
from tests.real.test_flash_attn_2 import kinds

pytestmark = needs("fa3-fwd")
RECORDED = report.load()
CELLS = [key for key in cells.every_key() if key[0] == "fp8"]
CELLS = CELLS if EVERYTHING else [key for key in CELLS if cells.sampled(key)][::3]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library in the fake's place."""
    real = loading.fa3_fwd()
    monkeypatch.setattr(flash, "FlashAttention3Forward", real)
    return real


def test_the_fake_has_the_signature_of_the_library() -> None:
    name = "flash_attn_varlen_func"
    assert kinds(getattr(flash.FlashAttention3Forward, name)) == kinds(getattr(loading.fa3_fwd(), name))


def test_what_the_record_serves_the_library_serves(library: Any) -> None:
    with hopper("fp8"):
        machine: Environment = Environment.current()
        asked = [need for need in served("fp8", machine, thin=None if EVERYTHING else 2) if need.chunk is None]
        assert len(asked) > 50
        found = {need: said for need in asked if need.dtype != "float32" and (said := wrong(need, fp8.fp8))}
    assert not found


def test_what_the_library_refuses_the_record_refuses(library: Any) -> None:
    need = Need(head_dim=64, heads=8, kv_heads=8, dtype="bfloat16", window=7)
    with hopper("fp8"):
        assert "does not support local attention" in wrong(need, fp8.fp8)
        assert not any(asked.window for asked in served("fp8", Environment.current()))


@pytest.mark.parametrize("key", CELLS, ids="/".join)
def test_models_run_on_the_library_as_on_the_fake(key: tuple[str, str, str], library: Any) -> None:
    cell = cells.run(*key)
    assert cell.status != "wrong", cell.detail
    if RECORDED["versions"]["transformers"] == transformers.__version__:
        assert cell.status == report.status(RECORDED["cells"]["fp8"][key[2]][key[1]]), cell.detail
