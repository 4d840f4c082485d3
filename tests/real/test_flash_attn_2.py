"""flash-attn 2.8.3 as released, but for its kernels: on what axattn's record says yes to it raises nothing and
is right, and the models of the matrix run on it as on the fake."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from axattn import backends
from axattn.backends import flash_calls
from axattn.machine.presets import machine
from axattn.spec.capability import Need, missing
from tests.conformance import cells, report
from tests.fakes import flash
from tests.real import flash_attn_2_cuda, loading
from tests.real.calls import wrong
from tests.real.needs import served
from tests.real.packages import EVERYTHING, folder, needs

pytestmark = needs("flash-attn", "einops")
NAME = "flash_attention_2"
RECORDED = report.load()
CELLS = [key for key in cells.every_key() if key[0] == NAME]
CELLS = CELLS if EVERYTHING else [key for key in CELLS if cells.sampled(key)][::2]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library in the fake's place."""
    real = loading.flash_attn()
    monkeypatch.setattr(flash, "FlashAttention2", real)
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    monkeypatch.syspath_prepend(folder("einops"))  # which imports parts of itself when first called
    flash_attn_2_cuda.deterministic_calls.clear()
    flash_calls.varlen_function.cache_clear()
    yield real
    flash_calls.varlen_function.cache_clear()


def kinds(function: Any) -> list[tuple[str, Any, Any]]:
    """Names, defaults and kinds of the arguments of a function."""
    return [(one.name, one.default, one.kind) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_the_fake_has_the_signatures_of_the_library(name: str) -> None:
    assert kinds(getattr(flash.FlashAttention2, name)) == kinds(getattr(loading.flash_attn(), name))


@pytest.mark.parametrize("chip", ["sm80", "sm86", "sm120", "rocm6"] if EVERYTHING else ["sm80"])
def test_what_the_record_serves_the_library_serves(chip: str, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn_2_cuda, "ignores_softcap", chip == "rocm6")
    monkeypatch.setattr(flash_attn_2_cuda, "compute_capability", machine(chip).architecture or (9, 0))
    asked = list(served(NAME, chip, thin=3 if EVERYTHING else 2))  # the whole grid is 4,800 calls a chip
    # a window to both sides over more keys than queries has no spans: such a call asks for a dense mask
    asked = [need for need in asked if not (need.window and not need.causal and need.cross_lengths)]
    assert len(asked) > 100
    found = {need: said for need in asked if (said := wrong(need, flash_calls.flash_2))}
    assert not found


def test_what_the_library_refuses_the_record_refuses(library: Any) -> None:
    """The other way round, for what the two share: of the combinations that the record refuses each is refused."""
    need = Need(head_dim=64, heads=8, kv_heads=8, dtype="float16", softcap=30.0, dropout=0.1)
    assert "Softcapping does not support dropout" in wrong(need, flash_calls.flash_2)
    record = backends.get(NAME).capability_on(machine("sm80"))
    assert any(refused.meets(need) for refused in record.refuses)


@pytest.mark.parametrize("chip", ["sm80", "sm86"])
def test_dropout_in_training_above_head_dim_192_needs_shared_memory(
    chip: str, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On small GPUs no kernel runs, and nothing says so."""
    monkeypatch.setattr(flash_attn_2_cuda, "compute_capability", machine(chip).architecture)
    need = Need(head_dim=208, heads=8, kv_heads=8, dtype="float16", dropout=0.1, gradient=True)
    refused = bool(missing(need, backends.get(NAME).capability_on(machine(chip)), NAME))
    assert bool(wrong(need, flash_calls.flash_2)) == refused == (chip == "sm86")


def test_a_deterministic_backward_reaches_the_kernel(library: Any) -> None:
    need = Need(head_dim=64, heads=8, kv_heads=2, dtype="float16", gradient=True)
    wrong(need, flash_calls.flash_2)
    mode = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode(2)
        wrong(need, flash_calls.flash_2)
    finally:
        torch.set_deterministic_debug_mode(mode)
    assert flash_attn_2_cuda.deterministic_calls == [False, True]


@pytest.mark.parametrize("key", CELLS, ids="/".join)
def test_models_run_on_the_library_as_on_the_fake(key: tuple[str, str, str], library: Any) -> None:
    cell = cells.run(*key)
    assert cell.status != "wrong", cell.detail
    if RECORDED["versions"]["transformers"] == transformers.__version__:
        assert cell.status == report.status(RECORDED["cells"][NAME][key[2]][key[1]]), cell.detail


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_the_fake_of_flash_attention_3_has_the_signatures_of_its_source(name: str) -> None:
    """``hopper/`` lies beside it in the source package and can't be imported without its operators. Builds newer than
    that can also return the logsumexp."""
    source = (folder("flash-attn") / "hopper" / "flash_attn_interface.py").read_text()
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    for argument in (*found.args.args, *found.args.kwonlyargs):
        argument.annotation = None
    made: dict[str, Any] = {}
    found.returns, found.body, found.decorator_list = None, [ast.Pass()], []
    exec(ast.unparse(found), made)
    *older, (last, _, _) = kinds(getattr(flash.FlashAttention3, name))
    assert older == kinds(made[name])
    assert last == "return_attn_probs"
