"""Every CPU benchmark in one command: ``python -m benchmarks.run [NAME ...] [--output FILE]``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import speed, training
from benchmarks.call_path import call_path, tiny_forward
from benchmarks.measure import ROOT, in_random_turns, interleaved, machine, ratios
from benchmarks.models import llama, packed, step
from benchmarks.shared_prefixes import shared_prefixes
from benchmarks.sinks import sinks


def import_time() -> dict[str, Any]:
    """``import axattn`` against ``import transformers``, a fresh interpreter each, in turn."""

    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

    times = interleaved(
        {"nothing": run("pass"), "transformers": run("import transformers"), "axattn": run("import axattn")}, 7
    )
    base = min(times["nothing"])
    with_axattn, stock = min(times["axattn"]) - base, min(times["transformers"]) - base
    loaded = subprocess.run(
        [sys.executable, "-c", "import axattn, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return {
        "ratio": round(with_axattn / stock, 4),
        "aim": "< 0.10",
        "also_loaded": json.loads(loaded.stdout.replace("'", '"')),
    }


def linear() -> dict[str, Any]:
    """Time and peak memory of a packed step against the token count, documents of 256 tokens: log-log slopes."""
    import math

    sizes = (2048, 4096, 8192, 16384, 32768)
    found: dict[str, Any] = {"tokens": sizes, "aim": "both exponents of varlen about 1.0"}
    for name in ("varlen", "sdpa"):
        measured = [_in_a_process(name, tokens) for tokens in sizes]
        span = math.log(sizes[-1] / sizes[0])
        found[name] = {
            "seconds": [round(m["seconds"], 4) for m in measured],
            "seconds_largest": [round(m["largest"], 4) for m in measured],
            "peak_mib": [round(m["peak"] / 2**20, 1) for m in measured],
            "time_exponent": round(math.log(measured[-1]["seconds"] / measured[0]["seconds"]) / span, 3),
            "memory_exponent": round(math.log(measured[-1]["peak"] / measured[0]["peak"]) / span, 3),
        }
    return found


def _in_a_process(name: str, tokens: int) -> dict[str, float]:
    """Best time and peak memory of a packed step in a process of its own (its memory is its peak minus its start)."""
    code = f"from benchmarks.run import one_step; one_step({name!r}, {tokens})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def one_step(name: str, tokens: int) -> None:
    """Print the best and largest time of three (above 16,384 tokens of one) and peak memory of a step as JSON."""
    import torch

    import axattn

    torch.set_num_threads(2)
    model = llama(192, 4, 6, 1024)
    if name == "sdpa":
        model.set_attn_implementation("sdpa")
    else:
        axattn.apply(model, name)
    step(model, packed(512, 2, 1024))()
    run, start = step(model, packed(tokens, tokens // 256, 1024)), _resident()
    seconds = []
    for _ in range(3 if tokens <= 16384 else 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    # VmHWM, not getrusage: the latter starts from the parent's peak on Linux
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 - start
    print(json.dumps({"seconds": min(seconds), "largest": max(seconds), "peak": peak}))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def loading() -> dict[str, Any]:
    """``axattn.from_pretrained`` against Transformers' own, on a tiny and on a 20 M model: CPU time of all threads."""
    import torch
    from transformers import AutoModelForCausalLM

    import axattn

    torch.set_num_threads(1)  # idle threads of OpenMP would be counted
    found: dict[str, Any] = {"aim": "tiny <= 1.10, 20 M <= 1.02"}
    for name, shape in (("tiny", (64, 4, 4, 128)), ("20M", (384, 8, 6, 8192))):
        with tempfile.TemporaryDirectory() as folder:
            llama(*shape).save_pretrained(folder)
            candidates = {
                "transformers": lambda folder=folder: AutoModelForCausalLM.from_pretrained(folder),
                "axattn": lambda folder=folder: axattn.from_pretrained(folder, attn_implementation="auto"),
            }
            found[name] = ratios(in_random_turns(candidates, 60, 3, time.process_time), "transformers")["axattn"]
    return found


BENCHMARKS = {
    "import_time": import_time,
    "tiny_forward": tiny_forward,
    "call_path": call_path,
    "loading": loading,
    "bound": speed.bound,
    "documents": speed.documents,
    "unpad": speed.unpad,
    "shared_prefixes": shared_prefixes,
    "fallback": speed.fallback,
    "sinks": sinks,
    "trainer_step": training.trainer_step,
    "rows_over_ranks": training.rows_over_ranks,
    "compilation": training.compilation,
    "linear": linear,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which (all when none is named)")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.names or BENCHMARKS:
        import torch

        torch.set_num_threads(2)
        results[name] = BENCHMARKS[name]()
        print(name, json.dumps(results[name], indent=2), flush=True)
        if arguments.output:  # after each: a run that is cut short keeps what it has
            arguments.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
