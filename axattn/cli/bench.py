"""``axattn bench MODEL | --shape B,H,Hkv,S,D``: times all usable kernels side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from axattn.cli.completion import attention_names


def bench(
    model: str = typer.Argument("", metavar="[MODEL]", help="Folder, config.json or hub name; its shapes are timed."),
    shape: str = typer.Option("", "--shape", metavar="B,H,Hkv,S,D", help="Time one shape instead of a model's."),
    seq_len: int = typer.Option(2048, "--seq-len", min=1, help="Tokens per row, for MODEL's shapes and steps."),
    packed: int = typer.Option(0, "--packed", metavar="DOCS", min=0, help="Pack the tokens as this many documents."),
    backward: bool = typer.Option(False, "--backward", help="Time forward and backward."),
    attn: list[str] = typer.Option(
        [],
        "--attn",
        metavar="NAME",
        autocompletion=attention_names,
        help="Time only this one (repeatable).",
    ),
    rounds: int = typer.Option(10, "--rounds", min=1, help="Timed calls per kernel; kernels take turns."),
    model_step: bool = typer.Option(False, "--model-step", help="Time whole training steps of MODEL."),
    output: Path | None = typer.Option(None, "--output", "-o", metavar="FOLDER", help="Write bench.json and plots."),
    compare: tuple[Path, Path] | None = typer.Option(None, "--compare", metavar="A B", help="Compare two bench.json."),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Time every kernel that runs on this machine, side by side in one run, relative to sdpa.

    Exit code 1 if no name given with --attn can be timed.

    Examples:
        axattn bench --shape 1,32,8,4096,128 --packed 16 --backward

        axattn bench ./my-model --seq-len 8192 --output results

        axattn bench ./my-model --model-step --attn varlen --attn sage

        axattn bench --compare before/bench.json after/bench.json
    """
    from importlib.util import find_spec

    from axattn.cli.output import print_json, quiet_transformers, user_errors
    from axattn.hf.checkpoints import require_source

    with user_errors(as_json):
        if compare is not None:
            from axattn.tools.bench.report import compare as compared
            from axattn.tools.bench.report import read

            rows = compared(read(compare[0]), read(compare[1]))
            print_json(rows) if as_json else _print_comparison(rows)
            return
        if bool(model) == bool(shape):
            raise typer.BadParameter("give either a MODEL or --shape")
        if model_step and not model:
            raise typer.BadParameter("--model-step needs a MODEL")
        if model:
            require_source(model)  # before Transformers is imported
        quiet_transformers()
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from axattn.tools.bench.kernels import bench
        from axattn.tools.bench.shapes import Shape, shapes_of

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, transient=True, disable=as_json, console=Console(stderr=True)) as bar:
            task = bar.add_task("starting")

            def say(text: str) -> None:
                bar.update(task, description=text)

            found: dict[str, Any]
            if model_step:
                found = _steps(model, attn, seq_len, packed or 8, rounds, say)
            else:
                shapes = [Shape.parse(shape, packed)] if shape else shapes_of(model, seq_len, packed)
                found = bench(shapes, kernels=attn, backward=backward, rounds=rounds, progress=say).to_dict()
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            (output / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            if find_spec("matplotlib") is None:
                typer.echo('axattn: no plot: matplotlib is not installed (pip install "axattn[bench]")', err=True)
            else:
                from axattn.tools.bench.report import plot

                plot(found, output / "bench.png")
        if as_json:
            print_json(found)
        else:
            _print(found, output)
    if attn and _all_failed(found):
        raise typer.Exit(1)


def _all_failed(found: Mapping[str, Any]) -> bool:
    """Whether every requested measurement failed; ``sdpa``, the baseline, always runs."""
    each = [*found.get("steps", ()), *(k for shape in found.get("shapes", ()) for k in shape["kernels"])]
    others = [one for one in each if one.get("name", one.get("kernel")) != "sdpa"] or each
    return bool(others) and all(one.get("failed") for one in others)


def _steps(model: str, attn: list[str], tokens: int, documents: int, rounds: int, say: Any) -> dict[str, Any]:
    import torch

    import axattn
    from axattn.errors import AxattnError, InvalidInputError, Reason
    from axattn.spec.names import canonicalise
    from axattn.tools.bench.kernels import machine_description, usable_kernels
    from axattn.tools.bench.steps import bench_step

    requested = [canonicalise(name) for name in attn]  # before anything is loaded
    try:
        loaded = axattn.from_pretrained(model, attn_implementation="eager")
    except AxattnError:
        raise
    except Exception as error:  # out of memory, or safetensors can't read the weights
        reason = Reason("weights", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise InvalidInputError(f"{model} can't be loaded", [reason]) from error
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu").train()
    names = requested or ["auto", *(name for name in usable_kernels() if ":" not in name)]
    steps = bench_step(loaded, names, tokens=tokens, documents=documents, rounds=min(rounds, 5), progress=say)
    return {
        "machine": machine_description(),
        "model": type(loaded).__name__,
        "tokens": tokens,
        "documents": documents,
        "steps": steps,
    }


def _print(found: Mapping[str, Any], output: Path | None) -> None:
    from rich.console import Console

    from axattn.tools.bench.report import by_speed, finding
    from axattn.tools.rows import Rows

    console = Console()
    if "steps" in found:
        title = f"{found['model']}, {found['tokens']:,} tokens"
        table = Rows("name", "time / sdpa's", "spread", "peak", "tokens/s", reason="why it did not run", title=title)
        for step in by_speed(found["steps"]):
            if "failed" in step:
                table.add(step["name"], "-", "-", "-", "-", reason=step["failed"])
            else:
                table.add(step["name"], *_ratio(step), _mib(step["peak_bytes"]), f"{step['tokens_per_s']:,}")
        console.print(table)
    for shape in found.get("shapes", ()):
        title = f"{shape['label']}, {found['dtype']}, forward{' and backward' if found['backward'] else ''}"
        columns = ("kernel", "time / sdpa's", "spread", "peak", "ms", "TFLOP/s", "of matmul", "error")
        table = Rows(*columns, reason="why it did not run", title=title)
        for k in by_speed(shape["kernels"]):
            if k["failed"]:
                table.add(k["kernel"], *["-"] * 7, reason=k["failed"])
                continue
            speeds = (_number(k["ms"]), _number(k["tflops"]), f"{k['share']:.0%}", _number(k["error"], "{:.1e}"))
            table.add(k["kernel"], *_ratio(k), _mib(k["peak_bytes"]), *speeds)
        console.print(table)
    console.print(f"{finding(found)}.")
    if output is not None:
        console.print(f"Wrote {', '.join(str(path) for path in sorted(output.glob('bench.*')))}")


def _ratio(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The ratio to ``sdpa``, and its quartiles."""
    low, high = entry.get("ratio_low"), entry.get("ratio_high")
    return _number(entry["ratio"]), "-" if low is None or high is None else f"{low:.3g} to {high:.3g}"


def _print_comparison(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from axattn.tools.rows import Rows

    table = Rows("shape", "kernel", "before", "after", "after / before")
    for row in rows:
        table.add(row["shape"], row["kernel"], *(_number(row[key]) for key in ("before", "after", "change")))
    Console().print(table)


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "-" if value is None else form.format(value)


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"
