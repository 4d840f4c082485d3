"""An installed axattn for child processes, whatever the environment of the tests has: its entry points as pyproject has
them, in a distribution that is found before any other of that name."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def install(folder: Path, *, code: Path = ROOT) -> dict[str, str]:
    """Write axattn's distribution into a folder; return the environment of a process that has it and runs `code`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "axattn-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: axattn\nVersion: 0\n")
    groups = project["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in groups[group].items()) for group in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    path = [str(code), *([] if code == ROOT else [str(ROOT)]), str(folder)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AXATTN_AUTO")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH", "")])]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(environment: dict[str, str], *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python with arguments; fail with its output if it fails."""
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done
