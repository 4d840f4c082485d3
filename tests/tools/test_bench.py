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
from axattn.tools import plotting
from axattn.tools.bench import kernels, report, steps
from axattn.tools.bench.kernels import bench, usable_kernels
from axattn.tools.bench.shapes import Shape, document_lengths, shapes_of
from axattn.tools.bench.timing import ratio_of
from tests.fakes.machine import hopper
from tests.models import build
from tests.tools.test_plotting import require_plain, texts

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


def _entry(name: str, ratio: float, low: float, high: float, peak: int = 0, failed: str = "") -> dict[str, Any]:
    found = {"kernel": name, "ms": 10 * ratio, "spread": 0.1, "ratio": ratio, "ratio_low": low, "ratio_high": high}
    return {**found, "tflops": 1.0, "share": 0.1, "peak_bytes": peak, "error": 1e-6, "failed": failed}


MADE: dict[str, Any] = {
    "machine": {},
    "dtype": "bfloat16",
    "backward": True,
    "shapes": [
        {
            "label": "B 1, H 32/8, S 8192, D 128",
            "kernels": [
                _entry("sdpa", 1.0, 1.0, 1.0, 900 << 20),
                _entry("fp8", 0.0, 0.0, 0.0, failed="RuntimeError: no kernel image for this GPU"),
                _entry("xformers", 0.9, 0.7, 1.2, 410 << 20),
                _entry("varlen", 0.25, 0.2, 0.4, 300 << 20),
            ],
        }
    ],
}
STEPS: dict[str, Any] = {
    "model": "LlamaForCausalLM",
    "tokens": 8192,
    "documents": 16,
    "steps": [
        {"name": "sdpa", "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "peak_bytes": None, "tokens_per_s": 1200},
        {"name": "auto", "ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.625, "peak_bytes": None, "tokens_per_s": 2400},
        {"name": "fp8", "failed": "BackendUnavailableError: fp8 can't run on this machine"},
    ],
}


def test_a_plot_sorts_kernels_and_writes_ratio_spread_and_memory_beside_them() -> None:
    for theme in (plotting.LIGHT, plotting.DARK):
        with plotting.style(theme):
            figure = report.drawn(MADE, theme)
            found = texts(figure)
        require_plain(found)
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert names == ["varlen", "xformers", "sdpa"]
        assert "varlen is the fastest in attention with backward: 4x as fast as sdpa" in found
        assert "4x as fast (2.5x to 5x)" in found
        assert {"300 MiB", "410 MiB", "900 MiB", "peak memory, MiB"} <= set(found)
    with plotting.style():
        found = texts(report.drawn(STEPS))
    require_plain(found)
    assert "auto is the fastest in a training step: 2x as fast as sdpa" in found
    assert "2x as fast (1.6x to 2.5x), 2,400 tokens/s" in found
    assert "LlamaForCausalLM, 8k tokens in 16 documents" in found
    assert "peak memory, MiB" not in found  # none was measured


def test_a_kernel_whose_quartiles_include_the_baseline_is_not_called_faster() -> None:
    unsure = json.loads(json.dumps(MADE))
    unsure["shapes"][0]["kernels"][3]["ratio_high"] = 1.1
    assert report.finding(unsure) == "No kernel is faster than sdpa in attention with backward here"
    older = json.loads(json.dumps(MADE))  # a file from before the quartiles
    for kernel in older["shapes"][0]["kernels"]:
        del kernel["ratio_low"], kernel["ratio_high"]
    assert "4x as fast as sdpa" in report.finding(older)
    assert report.against_sdpa(older["shapes"][0]["kernels"][3]) == "4x as fast"


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_tables_of_the_verb_are_sorted_and_cut_nothing(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from axattn.cli.bench import _print

    monkeypatch.setenv("COLUMNS", str(width))
    _print(MADE, None)
    _print(STEPS, None)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    assert out.index("varlen") < out.index("xformers") < out.index("fp8")
    for part in ("0.2 to 0.4", "300 MiB", "no kernel image", "is the fastest", "2,400"):
        assert "".join(part.split()) in "".join(out.translate(str.maketrans("", "", "│┃")).split()), part


def test_ratios_are_of_the_same_round() -> None:
    assert ratio_of([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == (2.0, 2.0, 2.0)
    middle, low, high = ratio_of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (middle, low, high) == (3.0, 2.0, 4.0)
    assert ratio_of([3.0], [2.0]) == (1.5, 1.5, 1.5)
    assert all(math.isnan(value) for value in ratio_of([1.0], None))


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
    step = ["bench", model, "--model-step", "--seq-len", "32", "--rounds", "1", "-o", str(tmp_path / "step"), "--json"]
    stepped = runner.invoke(app, step)
    assert {entry["name"] for entry in json.loads(stepped.output)["steps"]} == {"sdpa", "auto", "varlen"}
    assert {path.name for path in (tmp_path / "step").iterdir()} == {"bench.json", "bench.png", "bench.svg"}


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


def test_without_matplotlib_there_is_no_plot_and_it_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    done = runner.invoke(app, ["bench", "--shape", "1,4,2,32,16", "--rounds", "1", "-o", str(tmp_path)])
    assert done.exit_code == 0
    assert "matplotlib is not installed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
