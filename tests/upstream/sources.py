"""Transformers' own tests, in a folder of this checkout that git ignores: they are fetched, never kept in the project.

The source package on the registry holds the mixins that stand in `tests/` itself (`test_modeling_common.py` and kin),
not those of its folders (`generation/test_utils.py`, `exporters/test_export.py`): in their place come empty classes of
the same names, unless a checkout of Transformers is given, which has all of them.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build" / "upstream"
PACKAGE = "transformers_tests"
"""The name that Transformers' package `tests` gets, beside this project's own."""
MIXINS = "test_modeling_common.py"
NEEDED = ("parameterized",)
"""What the mixins import besides Transformers."""


class SourcesError(RuntimeError):
    """Transformers' tests can't be had; the message says why and what to do."""


@dataclass(frozen=True)
class Sources:
    """Where the tests are.

    Attributes:
        path: folders for ``PYTHONPATH``: the parent of `PACKAGE`, and of the packages that the mixins need.
        absent: mixins that the source lacks, as ``module.Class``; empty classes stand for them.
    """

    path: tuple[Path, ...]
    absent: tuple[str, ...]


def prepare(version: str, checkout: Path | None = None, build: Path = BUILD) -> Sources:
    """Have the tests of a Transformers version in `build`.

    Args:
        version: of Transformers, as installed.
        checkout: a folder of Transformers' repository to take the tests from; None fetches the source package.
        build: the folder that keeps them between runs.

    Raises:
        SourcesError: there is no network, or no such source.
    """
    packages = build / "packages"
    if not all((packages / name).exists() for name in NEEDED):
        _pip("install", "--quiet", "--no-deps", "--target", str(packages), *NEEDED)
    home = build / (f"transformers-{version}" if checkout is None else "checkout")
    if checkout is not None:
        if not (checkout / "tests" / MIXINS).exists():
            raise SourcesError(f"{checkout} is no checkout of Transformers: it has no tests/{MIXINS}.")
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(checkout / "tests", home / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    elif not (home / PACKAGE / MIXINS).exists():
        _unpack(_source_package(version, build), home)
    return Sources((home, packages), tuple(_stand_ins(home / PACKAGE)))


def _source_package(version: str, build: Path) -> Path:
    found = build / f"transformers-{version}.tar.gz"
    if not found.exists():
        wanted = ("--no-deps", "--no-binary", ":all:", "--dest", str(build), f"transformers=={version}")
        _pip("download", "--quiet", *wanted)
    return found


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SourcesError(
            f"Transformers' own tests are fetched by `pip {' '.join(arguments)}`, which failed: {said}\n"
            "Without a network, give a checkout of Transformers: python -m tests.upstream --source FOLDER "
            f"(and install {', '.join(NEEDED)} into {BUILD / 'packages'})."
        )


def _unpack(archive: Path, home: Path) -> None:
    """The folder ``tests`` of a source package, as `PACKAGE` in `home`."""
    unpacked = home / "unpacked"
    with tarfile.open(archive) as files:
        top = archive.name.removesuffix(".tar.gz")
        members = [member for member in files.getmembers() if member.name.startswith(f"{top}/tests/")]
        files.extractall(unpacked, members, filter="data")
    if not (unpacked / top / "tests" / MIXINS).exists():
        raise SourcesError(f"{archive.name} holds no tests/{MIXINS}: give a checkout of Transformers with --source.")
    shutil.rmtree(home / PACKAGE, ignore_errors=True)
    (unpacked / top / "tests").rename(home / PACKAGE)
    shutil.rmtree(unpacked)


def _stand_ins(package: Path) -> list[str]:
    """Make the modules that the mixins import from folders that the source lacks, with empty classes in them."""
    (package / "__init__.py").touch()
    absent = []
    for node in ast.walk(ast.parse((package / MIXINS).read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.module is None:
            continue
        file = package.joinpath(*node.module.split(".")).with_suffix(".py")
        made = file.with_name(f".{file.name}.stand_in")
        if file.exists() and not made.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text("".join(f"class {name.name}:\n    pass\n\n\n" for name in node.names))
        made.touch()
        absent += [f"{node.module}.{name.name}" for name in node.names]
    return absent


def environment(sources: Sources) -> dict[str, str]:
    """The environment of a process that runs the tests."""
    here = str(Path(__file__).parents[2])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([here, *map(str, sources.path)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
