"""What the demo will do and how long it takes. Printed first, so nothing heavy is imported here."""

from __future__ import annotations

import os
from pathlib import Path

WRITES = ("model", "loss.png", "report.json")
"""All that the demo leaves in its folder."""


def seconds(steps: int, cores: int) -> float:
    """How long the demo takes without a GPU: 165 s for 200 steps on two cores (AMD EPYC), 126 s of them for the steps.
    No faster than on eight cores."""
    return 40 + 1.26 * steps / min(max(cores, 1), 8)


def announcement(output: Path, attn: str, steps: int) -> str:
    """A few lines: the job, the time, what is written where."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    minutes = max(round(seconds(steps, cores) / 60), 1)
    time = f"{minutes} minute{'s' if minutes > 1 else ''} on {cores} idle CPU core{'s' if cores > 1 else ''}"
    return (
        f"The demo fine-tunes a LLaMA of 2 M parameters for {steps} steps on packed rows of Python's\n"
        f'standard library with attn_implementation="{attn}", and proves that no document leaks into another.\n'
        f"It takes about {time}, less with a GPU, downloads nothing,\n"
        f"and writes {', '.join(WRITES[:-1])} and {WRITES[-1]} to {output}/."
    )
