"""Interleaved timing: candidates take turns within one process, so a noisy machine hurts all of them alike."""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` per candidate, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def in_random_turns(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, list[float]]:
    """CPU seconds of every call, in a new order each round, on a busy machine: those of this thread, or by ``clock``
    (``time.process_time``: of all threads)."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for turn in range(warmup + rounds):
        for name in order.sample(list(candidates), len(candidates)):
            start = clock()
            candidates[name]()
            if turn >= warmup:
                times[name].append(clock() - start)
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median of the round-by-round ratios to `base` (below 1: faster), and their quartiles."""
    result = {}
    for name, values in times.items():
        each = [a / b for a, b in zip(values, times[base], strict=True)]
        quarters = statistics.quantiles(each, n=4) if len(each) > 1 else [each[0]] * 3
        result[name] = {
            "ratio": round(statistics.median(each), 4),
            "q1": round(quarters[0], 4),
            "q3": round(quarters[2], 4),
            "best_ms": round(min(values) * 1e3, 4),
        }
    return result


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no paths, no host names."""
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
