"""What axattn's entry point adds to ``import torch``: ``python -m benchmarks.autoload`` prints milliseconds of
processor time and of wall time, the median of fresh processes. Meant to stay under 10 ms."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

CODE = """
import time, torch
wall, cpu = time.perf_counter(), time.process_time()
import axattn_autoload
axattn_autoload.register()
print((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)
"""


def measure(processes: int = 11) -> tuple[float, float]:
    """Milliseconds of processor time and of wall time."""
    found = []
    for _ in range(processes):
        done = subprocess.run(
            [sys.executable, "-c", CODE], env=_environment(), capture_output=True, text=True, check=True
        )
        found.append(tuple(float(number) for number in done.stdout.split()))
    cpu, wall = (statistics.median(numbers) for numbers in zip(*found, strict=True))
    return cpu, wall


def _environment() -> dict[str, str]:
    return {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # it is called, and timed, afterwards


if __name__ == "__main__":
    cpu, wall = measure()
    print(f"axattn's entry point: {cpu:.1f} ms of processor time, {wall:.1f} ms")
