"""What an installed axattn adds to the processes that never use it, in processor time of fresh processes:
``python -m benchmarks.autoload``. Meant to stay under 10 ms for ``import torch`` (the entry point of
``axattn_autoload.py``) and under 0.1 s where ``transformers.modeling_utils`` is imported afterwards (the registration).

Processes with and without ``AXATTN_AUTOLOAD=0`` take turns, because other work on the machine slows both. axattn's
modules have byte code, as pip leaves them.
"""

from __future__ import annotations

import argparse
import compileall
import os
import statistics
import subprocess
import sys
from pathlib import Path

import axattn

ENTRY = """
import time, torch
start = time.process_time()
import axattn_autoload
axattn_autoload.register()
print((time.process_time() - start) * 1e3)
"""
REGISTRATION = """
import time, torch, transformers.modeling_utils
start = time.process_time()
import axattn_autoload
axattn_autoload.register()
print((time.process_time() - start) * 1e3)
"""
WHOLE = """
import time, torch, transformers.modeling_utils
print(time.process_time() * 1e3)
"""


def measure(code: str, processes: int, *, calls: bool) -> tuple[list[float], list[float]]:
    """Milliseconds of processor time with axattn's entry point and with ``AXATTN_AUTOLOAD=0``.

    Args:
        code: prints them.
        processes: of either kind, in turns.
        calls: whether torch calls the entry point, or `code` does.
    """
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(calls)), "PYTHONDONTWRITEBYTECODE": "1"}
    root = Path(axattn.__file__).parent
    compileall.compile_dir(root, quiet=1)
    compileall.compile_file(root.parent / "axattn_autoload.py", quiet=1)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(processes):
        for numbers, value in zip(found, ("1", "0"), strict=True):
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**environment, "AXATTN_AUTOLOAD": value},
                capture_output=True,
                text=True,
                check=True,
            )
            numbers.append(float(done.stdout))
    return found


def shown(what: str, found: tuple[list[float], list[float]]) -> str:
    """Medians, and the median of the ratios and differences of the pairs."""
    on, off = found
    pairs = list(zip(on, off, strict=True))
    return (
        f"{what}: {statistics.median(on):.2f} ms (without {statistics.median(off):.2f} ms); pairs differ by "
        f"{statistics.median(a - b for a, b in pairs):.2f} ms, ratio {statistics.median(a / b for a, b in pairs):.3f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=21, help="of either kind")
    processes = parser.parse_args().processes
    print(shown("entry point", measure(ENTRY, processes, calls=False)))
    print(shown("entry point and registration", measure(REGISTRATION, processes, calls=False)))
    print(shown("import torch, transformers.modeling_utils", measure(WHOLE, processes, calls=True)))
