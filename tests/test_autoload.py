"""What an installed axattn does in a process that imports only torch or Transformers (``axattn_autoload.py``)."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import axattn
import axattn_autoload
from axattn.cli import app
from axattn.hf import registries
from axattn.machine import autoload
from tests import installed

HEAVY = ("torch", "transformers", "pydantic", "typer", "rich", "yaml", "numpy")
KNOWN = "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A; print('varlen' in A, 'auto' in A)"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return installed.install(tmp_path_factory.mktemp("site"))


@pytest.mark.nightly
@pytest.mark.parametrize("first", ["", "import torch;", "import axattn;"])
def test_transformers_knows_the_names_in_a_process_that_never_imports_axattn(
    environment: dict[str, str], first: str
) -> None:
    done = installed.run(environment, "-c", first + KNOWN)
    assert done.stdout.split() == ["True", "True"]
    assert "axattn" not in done.stderr


def test_a_child_process_knows_them_too_and_imports_only_what_registers_them(environment: dict[str, str]) -> None:
    start = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    code = f"""
{KNOWN}
import sys
print(len([name for name in sys.modules if name.startswith('axattn')]))
print(*[name for name in ('axattn.attention.interface', 'transformers.masking_utils') if name in sys.modules])
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as M
print('varlen' in M, A['varlen'].func.__module__, M['varlen'].__module__)
"""
    known, modules, more, masks = installed.run(environment, "-c", start, code).stdout.splitlines()
    assert known == "True True"
    assert int(modules) <= 16
    assert not more
    assert masks == "True axattn.attention.registry_functions axattn.attention.registry_functions"


ENTRY = "import importlib.metadata as m, sys; [e] = m.entry_points(group='torch.backends', name='axattn'); e.load()()"
"""What ``import torch``, which takes seconds, does with axattn's entry point."""
CALLS = [
    pytest.param(ENTRY, id="entry point"),
    pytest.param("import torch, sys", marks=pytest.mark.nightly, id="torch"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["AXATTN_AUTOLOAD", "AXATTN_AUTO_REGISTER"])
def test_it_can_be_turned_off(environment: dict[str, str], name: str, call: str) -> None:
    _assert_off(environment, name, call)


@pytest.mark.nightly
def test_torch_can_turn_it_off(environment: dict[str, str]) -> None:
    _assert_off(environment, "TORCH_DEVICE_BACKEND_AUTOLOAD", "import torch, sys")


def _assert_off(environment: dict[str, str], name: str, call: str) -> None:
    code = f"{call}\nprint(any(name in sys.modules for name in ('axattn.hf.post_import', 'axattn')))"
    code += "\nfrom axattn.attention import registration as r; r.register_when_imported(); print(r._waiting)"
    done = installed.run({**environment, name: "0"}, "-c", code)
    imported, then_by_import = done.stdout.split()
    assert imported == str(name == "AXATTN_AUTO_REGISTER")
    assert then_by_import == str(name != "AXATTN_AUTO_REGISTER")


def test_the_entry_point_imports_nothing_heavy_and_few_modules(environment: dict[str, str]) -> None:
    code = f"""
import importlib.metadata, logging, threading, typing, sys  # torch has imported these
before = set(sys.modules)
[entry] = importlib.metadata.entry_points(group='torch.backends', name='axattn')
entry.load()()
new = set(sys.modules) - before
print(*[name for name in {HEAVY} if name in sys.modules], len(new))
print(*sorted(name for name in new if not name.startswith('axattn')))
"""
    lines = installed.run(environment, "-c", code).stdout.splitlines()
    assert int(lines[0]) <= 8, lines
    assert lines[1:] == [""], lines


BREAKS = {
    "a syntax error": ("__init__.py", "def ("),
    "an error of any kind at import": ("__init__.py", "raise RuntimeError('no')"),
    "an older axattn": ("attention/registration.py", "x = 1"),
    "a failing registration": ("hf/post_import.py", "def after_import(*given): raise OSError('no')\n"),
    "a missing file": ("hf/post_import.py", None),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", BREAKS)
def test_import_torch_survives_a_broken_installation_with_a_warning(tmp_path: Path, what: str, call: str) -> None:
    file, text = BREAKS[what]
    for part in ("__init__.py", "attention/__init__.py", "attention/registration.py", "hf/__init__.py"):
        (tmp_path / "code/axattn" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed.ROOT / "axattn" / part, tmp_path / "code/axattn" / part)
    for part in ("hf/own_functions.py", "hf/post_import.py"):
        shutil.copy(installed.ROOT / "axattn" / part, tmp_path / "code/axattn" / part)
    changed = tmp_path / "code/axattn" / file
    changed.unlink() if text is None else changed.write_text(text)
    environment = installed.install(tmp_path / "site", code=tmp_path / "code")
    done = installed.run(environment, "-c", f"{call}; print('goes on')", cwd=tmp_path)
    assert done.stdout.strip() == "goes on"
    assert "axattn: its backends are not registered" in done.stderr
    assert "AXATTN_AUTOLOAD=0" in done.stderr


@pytest.mark.parametrize("module", ["axattn", "axattn.attention", "axattn.attention.registration"])
def test_a_module_half_imported_by_another_thread_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: str
) -> None:
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, type(sys)(module))
    with caplog.at_level(logging.WARNING):
        axattn_autoload.register()
    assert "its backends are not registered" in caplog.text


def test_it_registers_in_this_process_and_twice_is_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AXATTN_AUTOLOAD", raising=False)
    importlib.import_module("transformers.modeling_utils")
    axattn.unregister()
    axattn_autoload.register()
    axattn_autoload.register()
    assert axattn.registered()


def test_doctor_names_the_package_that_took_an_axattn_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs() -> None: ...

    axattn.register()
    attention, _ = registries.interfaces()
    monkeypatch.setitem(attention._global_mapping, "varlen", theirs)
    owner = f"attention 'varlen' is held by {__name__}.{theirs.__qualname__}"
    kernels = {kernel.name: kernel for kernel in axattn.diagnose().kernels}
    assert [reason.text for reason in kernels["varlen"].reasons] == [owner]
    assert kernels["sdpa"].usable
    done = CliRunner().invoke(app, ["doctor", "--require", "varlen", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["message"] == f"axattn's varlen can't be loaded in this process: {owner}"


def test_doctor_says_whether_it_is_on(environment: dict[str, str]) -> None:
    code = "from axattn.machine import autoload; print([reason.text for reason in autoload.why_off()])"
    assert installed.run(environment, "-c", code).stdout.strip() == "[]"
    off = {**environment, "AXATTN_AUTOLOAD": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    said = installed.run(off, "-c", code).stdout
    assert "AXATTN_AUTOLOAD=0 in the environment" in said
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment" in said


def test_doctor_says_that_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoload, "entry_points", lambda group: ())
    monkeypatch.delenv("AXATTN_AUTOLOAD", raising=False)
    assert [reason.fix for reason in autoload.why_off()] == ["pip install axattn"]
    assert [r["text"] for r in axattn.diagnose().to_dict()["not_autoloaded"]] == [
        "no installed distribution has the entry point axattn_autoload:register of torch.backends"
    ]
    assert axattn.diagnose("sm90").to_dict()["not_autoloaded"] == []


def test_the_entry_point_in_pyproject_is_what_doctor_looks_for() -> None:
    project = tomllib.loads((installed.ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][autoload._GROUP] == {"axattn": autoload._ENTRY}
    assert f"{axattn_autoload.__name__}:{axattn_autoload.register.__name__}" == autoload._ENTRY
