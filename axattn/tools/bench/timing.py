"""Times candidates in turn in one process, so that noise affects all alike. Uses CUDA events on a GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[[], object]


def ratio_of(spent: Sequence[float], base: Sequence[float] | None) -> tuple[float, float, float]:
    """Median and quartiles of the round-by-round ratios of two candidates that took turns; NaN without a base."""
    if base is None:
        return math.nan, math.nan, math.nan
    each = [a / b for a, b in zip(spent, base, strict=True)]
    if len(each) == 1:
        return each[0], each[0], each[0]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return middle, low, high


def timed(candidates: dict[str, Run], rounds: int, warmup: int = 3, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds of each call: `rounds` per candidate, in turn, after `warmup` rounds."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            spent = _once_on_a_gpu(run) if device == "cuda" else _once(run)
            if turn >= warmup:
                times[name].append(spent)
    return times


def _once(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _once_on_a_gpu(run: Run) -> float:
    make: Any = torch.cuda.Event
    start, end = make(enable_timing=True), make(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def working(candidates: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The candidates that run, and why the others don't."""
    runs, failed = {}, {}
    for name, run in candidates.items():
        try:
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            runs[name] = run
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return runs, failed


def peak_bytes(run: Run) -> int | None:
    """Peak bytes that a call allocates on the GPU, beyond those allocated before; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def matmul_tflops(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured TFLOP/s of a large matrix product, the reference for `Timing.share`."""
    size = size or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(timed({"matmul": lambda: a @ b}, 10, device=device)["matmul"])
    return 2 * size**3 / best / 1e9
