"""``python -m tests.dist FOLDER``: what was built there holds what it must, installs in an empty environment and works.

The wheel is installed without extras first, then with ``demo``; every command runs from a folder outside of the
repository. Needs pip and the registry. Nothing is uploaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.utils import parse_sdist_filename, parse_wheel_filename
from packaging.version import Version
from trove_classifiers import classifiers

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    *("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "Makefile", "constraints.txt"),
    *("axattn/__init__.py", "axattn/py.typed", "tests/conftest.py", "docs/attention.md", "examples/trainer.py"),
)
RUBBISH = ("__pycache__", ".git", ".ci", ".venv", "build", "dist", "demo-output", ".hypothesis", ".DS_Store")
DEMO_STEPS = 20


def main() -> int:
    """Check the one sdist and the one wheel of the folder."""
    folder = Path(sys.argv[1]).resolve()
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    version = parse_sdist_filename(sdist.name)[1]
    assert parse_wheel_filename(wheel.name)[1] == version, (sdist.name, wheel.name)
    require_contents(sdist, wheel)
    with tempfile.TemporaryDirectory(prefix="axattn-dist-") as outside:
        require_working(wheel, version, Path(outside))
        require_same_wheel(sdist, wheel, Path(outside))
    print(f"axattn {version}: {sdist.name} and {wheel.name} are right")
    return 0


def require_contents(sdist: Path, wheel: Path) -> None:
    """The sdist has the sources, tests and docs; the wheel has the package and torch's entry point, nothing else."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not (absent := set(NEEDED) - held), f"{sdist.name} lacks {sorted(absent)}"
    rubbish = sorted(name for name in held if set(name.split("/")) & set(RUBBISH))
    assert not rubbish, f"{sdist.name} holds {rubbish}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    unknown = set(HeaderParser().parsestr(metadata).get_all("Classifier", [])) - classifiers
    assert not unknown, f"the index refuses the classifiers {sorted(unknown)}"
    package = {name for name in names if name.startswith("axattn/")}
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "axattn").rglob("*.py")} | {"axattn/py.typed"}
    assert package >= source, f"{wheel.name} lacks {sorted(source - package)}"
    other = [name for name in names if name not in package and ".dist-info/" not in name]
    assert other == ["axattn_autoload.py"], f"{wheel.name} holds {other}"


def require_working(wheel: Path, version: Version, outside: Path) -> None:
    """Installed without extras: import, doctor, plan. With ``demo``: the demo, which proves its results itself."""
    run(sys.executable, "-m", "venv", outside / "environment")
    python, axattn = (outside / "environment" / "bin" / name for name in ("python", "axattn"))
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    pip = (python, "-m", "pip", "install", "-q")
    run(*pip, "--upgrade", "pip")
    run(*pip, torch)
    run(*pip, "-c", ROOT / "constraints.txt", wheel)
    run(python, "-m", "pip", "check")
    elsewhere = outside / "elsewhere"
    elsewhere.mkdir()
    code = "import axattn; print(axattn.__version__, axattn.__file__)"
    imported = run(python, "-c", code, folder=elsewhere).split()
    assert imported[0] == str(version), imported
    assert Path(imported[1]).is_relative_to(outside), imported
    assert run(axattn, "--version", folder=elsewhere) == f"axattn {version}\n"
    kernels = json.loads(run(axattn, "doctor", "--json", folder=elsewhere))["kernels"]
    assert any(kernel["name"] == "varlen" and kernel["usable"] for kernel in kernels), kernels
    code = "import torch; from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A; print('varlen' in A)"
    assert run(python, "-c", code, folder=elsewhere) == "True\n", "import torch did not register the names"
    code = "import transformers; transformers.LlamaConfig(num_hidden_layers=2).save_pretrained('tiny')"
    run(python, "-c", code, folder=elsewhere)
    assert json.loads(run(axattn, "plan", "tiny", "--json", folder=elsewhere))["layers"]
    refused = run(axattn, "demo", folder=elsewhere, fails=True)
    assert 'pip install "axattn[demo]"' in refused, refused
    run(*pip, "-c", ROOT / "constraints.txt", f"axattn[demo] @ {wheel.as_uri()}")
    printed = run(axattn, "demo", "--steps", DEMO_STEPS, "--output", "demo", folder=elsewhere)
    print(printed)
    assert json.loads((elsewhere / "demo" / "report.json").read_text()), printed


def require_same_wheel(sdist: Path, wheel: Path, outside: Path) -> None:
    """A wheel that is built from the unpacked sdist, where there is no git, has the same version and files."""
    with tarfile.open(sdist) as archive:
        archive.extractall(outside / "sdist", filter="data")
    (source,) = (outside / "sdist").iterdir()
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", outside / "rebuilt", source)
    (rebuilt,) = (outside / "rebuilt").glob("*.whl")
    assert rebuilt.name == wheel.name, (rebuilt.name, wheel.name)
    with zipfile.ZipFile(rebuilt) as one, zipfile.ZipFile(wheel) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def run(*command: object, folder: Path | None = None, fails: bool = False) -> str:
    """What a command prints (on stderr where it must fail), which that sees nothing of this repository."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder or Path(tempfile.gettempdir()), env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, (
        f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout if not fails else done.stderr


if __name__ == "__main__":
    sys.exit(main())
