"""The libraries whose own code is run here: pinned, unpacked in ``build/real`` and never installed.

``python -m tests.real.packages`` fetches them (``make real-kernels`` does); tests of an absent one are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "build" / "real"
EVERYTHING = os.environ.get("AXATTN_REAL") == "all"
"""Every case, as ``make real-kernels`` runs them; else a slice of a few seconds."""


@dataclass(frozen=True)
class Package:
    """One library.

    Attributes:
        requirement: as pip takes it.
        source: there is no wheel: its source package is unpacked, nothing is built.
    """

    requirement: str
    source: bool = False


PACKAGES = {
    "flash-attn": Package("flash-attn==2.8.3", source=True),  # 8 MB
    "fa3-fwd": Package("fa3-fwd==0.0.3"),  # 28 MB, its kernels with it
    "torchao": Package("torchao==0.18.0"),  # 3 MB
    "torchao-0.17": Package("torchao==0.17.0"),
    "einops": Package("einops==0.8.2"),  # flash-attn imports it
}


def folder(name: str) -> Path:
    """Where a library lies; to be put on ``sys.path``."""
    return ROOT / name


def is_there(name: str) -> bool:
    """Whether a library has been fetched, in the version pinned."""
    note = folder(name) / ".requirement"
    return note.exists() and note.read_text() == PACKAGES[name].requirement


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test where libraries are absent."""
    absent = [PACKAGES[name].requirement for name in names if not is_there(name)]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)} in build/real: `make real-kernels`")


def fetch(name: str) -> None:
    """Unpack a library, without what it depends on."""
    package, target = PACKAGES[name], folder(name)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if package.source:
        library = package.requirement.split("==")[0]
        with tempfile.TemporaryDirectory() as folder_:
            environment = {
                **os.environ,
                "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE",
            }  # pip asks its setup.py for metadata
            options = ["-q", "--no-deps", "--no-binary", library, "--no-build-isolation", "-d", folder_]
            subprocess.run([*pip, "download", *options, package.requirement], check=True, env=environment)
            (archive,) = Path(folder_).glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                opened.extractall(folder_, filter="data")
            (root,) = (path for path in Path(folder_).iterdir() if path.is_dir())
            shutil.copytree(
                root, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cutlass", "composable_kernel")
            )
    else:
        subprocess.run(
            [*pip, "install", "-q", "--no-deps", "--only-binary", ":all:", "--target", target, package.requirement],
            check=True,
        )
    (target / ".requirement").write_text(package.requirement)


def main() -> None:
    """Fetch what is absent."""
    for name, package in PACKAGES.items():
        if not is_there(name):
            fetch(name)
        print(f"{package.requirement}: {folder(name).relative_to(ROOT.parents[1])}")


if __name__ == "__main__":
    main()
