"""bench: what is measured is what is said; a kernel that fails is part of the result. No time is asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import axattn
from axattn.cli import app
from axattn.errors import InvalidConfigError, UnknownAttentionError
from axattn.tools.bench import kernels, report, steps
from axattn.tools.bench.kernels import bench, usable_kernels
from axattn.tools.bench.shapes import Shape, document_lengths, shapes_of
from tests.fakes.machine import hopper
from tests.models import build

runner = CliRunner()
SMALL = Shape(1, 4, 2, 64, 16)


def test_every_kernel_of_the_machine_is_measured_against_sdpa() -> None:
    found = bench([SMALL, SMALL.packed(3)], backward=True, rounds=2)
    assert [str(shape) for shape, _ in found.shapes] == ["B 1, H 4/2, S 64, D 16", str(SMALL.packed(3))]
    for _, timings in found.shapes:
        assert [t.kernel for t in timings] == ["sdpa", "varlen"]
        assert timings[0].ratio == 1.0
        assert all(t.ms > 0 and t.tflops > 0 and not t.failed for t in timings)
        assert all(t.error is not None and t.error < 1e-5 for t in timings)
    assert json.loads(json.dumps(found.to_dict()))["backward"] is True
    assert {"axattn", "libraries"} <= found.machine.keys()
    checkout = (Path(axattn.__file__).parents[1] / ".git").exists()
    assert bool(found.machine["commit"]) is checkout


def test_kernels_of_libraries_are_called_through_their_adapters() -> None:
    from tests.fakes import flash

    with hopper("flash_attention_2", "fp8"):
        found = bench([SMALL.packed(3)], kernels=["flash_attention_2", "fp8"], rounds=1, dtype=torch.float32)
        assert flash.calls.count("flash_attention_2") == flash.calls.count("fp8") > 0
    assert [t.kernel for t in found.shapes[0][1]] == ["sdpa", "flash_attention_2", "fp8"]


def test_a_kernel_that_fails_is_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.attend

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "varlen":
            raise RuntimeError("no kernel image\nmore")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(kernels, "attend", broken)
    timings = bench([SMALL], rounds=1).shapes[0][1]
    assert timings[1].failed == "RuntimeError: no kernel image"
    assert math.isnan(timings[1].ms)
    assert not timings[0].failed


def test_a_wrong_kernel_shows_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.attend

    def wrong(name: str, *args: Any, **kwargs: Any) -> Any:
        out, weights = real(name, *args, **kwargs)
        return (out * 1.5 if name == "varlen" else out), weights

    monkeypatch.setattr(kernels, "attend", wrong)
    assert bench([SMALL], rounds=1).shapes[0][1][1].error == pytest.approx(0.5, rel=1e-3)


@given(st.integers(1, 3000), st.integers(1, 400))
def test_document_lengths_add_up(tokens: int, mean: int) -> None:
    found = document_lengths(tokens, mean)
    assert sum(found) == tokens
    assert min(found) > 0


def test_flops_count_causal_pairs() -> None:
    assert SMALL.flops() == 4 * 4 * 16 * 64 * 65 / 2
    windowed = Shape(1, 4, 2, 64, 16, None, 10)
    assert windowed.flops() == 4 * 4 * 16 * sum(min(i + 1, 10) for i in range(64))
    assert Shape(1, 4, 2, 64, 16, (40, 24)).flops() == 4 * 4 * 16 * (40 * 41 / 2 + 24 * 25 / 2)


@pytest.mark.parametrize("text", ["", "1,2,3", "a,b,c,d,e", "1,4,3,64,16", "0,4,2,64,16", "1,4,2,64,16,7"])
def test_a_shape_that_is_none(text: str) -> None:
    with pytest.raises(InvalidConfigError, match="--shape"):
        Shape.parse(text)


def test_the_shapes_of_a_model() -> None:
    found = shapes_of(build("gemma3"), 64)
    assert {shape.window for shape in found} == {None, 5}
    assert all(shape.length == 64 for shape in found)
    assert [len(shape.documents or ()) > 1 for shape in shapes_of(build("llama"), 64, 4)] == [True]


def test_a_name_that_is_not_measured_alone() -> None:
    with pytest.raises(UnknownAttentionError, match=r"flex_attention can't be timed alone.*--model-step"):
        usable_kernels(["flex_attention"])


def test_steps_of_a_model_leave_it_as_it_was() -> None:
    model = build("llama").train()
    before = model.config._attn_implementation
    found = steps.bench_step(model, ["auto", "fp8"], tokens=48, documents=3, rounds=1)
    assert [entry["name"] for entry in found] == ["sdpa", "auto", "fp8"]
    assert found[0]["ratio"] == 1.0
    assert found[1]["tokens_per_s"] > 0
    assert "fp8 can't run on this machine" in found[2]["failed"]
    assert model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_comparing_two_files(tmp_path: Path) -> None:
    found = bench([SMALL], rounds=1).to_dict()
    changed = json.loads(json.dumps(found))
    changed["shapes"][0]["kernels"][1]["ratio"] = 2 * found["shapes"][0]["kernels"][1]["ratio"]
    rows = report.compare(found, changed)
    assert [row["change"] for row in rows] == [1.0, 2.0]
    for text in ("{", "[]", '{"shapes": 3}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InvalidConfigError, match=r"x\.json is not a benchmark"):
            report.read(tmp_path / "x.json")


# ---- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = runner.invoke(app, ["bench", "--shape", "1,4,2,64,16", "--packed", "3", "--rounds", "1", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "varlen" in done.output
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"
    file = str(out / "bench.json")
    assert json.loads((out / "bench.json").read_text())["machine"]["axattn"] == axattn.__version__
    compared = runner.invoke(app, ["bench", "--compare", file, file, "--json"])
    assert [row["change"] for row in json.loads(compared.output)] == [1.0, 1.0]
    build("llama").save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    found = json.loads(runner.invoke(app, ["bench", model, "--seq-len", "32", "--rounds", "1", "--json"]).output)
    assert found["shapes"][0]["label"].startswith("B 1, H 4/2, S 32")
    stepped = runner.invoke(app, ["bench", model, "--model-step", "--seq-len", "32", "--rounds", "1", "--json"])
    assert {entry["name"] for entry in json.loads(stepped.output)["steps"]} == {"sdpa", "auto", "varlen"}


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "MODEL or --shape"),
        (["--model-step", "--shape", "1,4,2,64,16"], 2, "--model-step needs a MODEL"),
        (["--shape", "1,2"], 1, "B,H,Hkv,S,D"),
        (["--shape", "1,4,2,64,16", "--attn", "eager"], 1, "can't be timed alone"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, part: str) -> None:
    done = runner.invoke(app, ["bench", *arguments])
    assert done.exit_code == code
    assert part in done.stderr
    assert "Traceback" not in done.output


def test_without_matplotlib_there_is_no_plot_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    done = runner.invoke(app, ["bench", "--shape", "1,4,2,32,16", "--rounds", "1", "-o", str(tmp_path)])
    assert done.exit_code == 0
    assert "matplotlib is not installed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
