from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import axattn
from axattn.cli import app
from axattn.planning.diagnosis import diagnose
from tests.environments import CPU, HOPPER
from tests.models import build

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma2")
    build("gemma2").save_pretrained(path)
    return path


def test_help_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['axattn', '--help']\nfrom axattn.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit: pass\n"
    code += "print('heavy:', [m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "heavy: []" in done.stdout, done.stderr
    for verb in ("doctor", "plan", "verify", "bench", "migrate", "demo"):
        assert verb in done.stdout


@pytest.mark.parametrize("verb", ["doctor", "plan", "verify", "bench", "migrate", "demo"])
def test_every_verb_explains_itself_with_examples_that_it_accepts(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = runner.invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    examples = re.findall(rf"axattn {verb}\b[^\n│]*", done.output.split("Examples:")[1].split("─")[0])
    assert examples
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]  # the verbs are a group
    for example in examples:
        command.make_context(verb, shlex.split(example)[2:])  # raises for an option that the verb does not have


def complete(*words: str, shell: str = "bash") -> list[str]:
    """What the shell's completion offers for the last word, as the generated script asks for it."""
    environment = {"_AXATTN_COMPLETE": f"complete_{shell}", "COMP_WORDS": " ".join(words)}
    environment |= {"COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": " ".join(words)}
    code = "import atexit, sys\n"
    code += "heavy = lambda: [m for m in ('torch', 'transformers') if m in sys.modules]\n"
    code += "atexit.register(lambda: print('heavy:', heavy(), file=sys.stderr))\n"
    code += "sys.argv = ['axattn']\nfrom axattn.cli import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert "heavy: []" in done.stderr, done.stderr  # the Tab key answers at once
    return done.stdout.split()


def test_the_shell_completes_verbs_options_names_and_machines() -> None:
    assert complete("axattn", "") == ["doctor", "plan", "verify", "bench", "migrate", "demo"]
    assert complete("axattn", "ver") == ["verify"]
    assert complete("axattn", "plan", "--env") == ["--environment"]
    assert complete("axattn", "plan", "model", "--attn", "flash_") == [f"flash_attention_{n}" for n in (2, 3, 4)]
    assert complete("axattn", "plan", "model", "--environment", "sm9") == ["sm90"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_a_shell_is_printed(shell: str) -> None:
    from typer import completion

    script = completion.get_completion_script(prog_name="axattn", complete_var="_AXATTN_COMPLETE", shell=shell)
    code = f"import sys; sys.argv = ['axattn', '--show-completion', {shell!r}]; from axattn.cli import main; main()"
    unknown = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | unknown
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == script.strip()
    assert "_AXATTN_COMPLETE" in script


def test_the_version_is_the_packages() -> None:
    assert axattn.__version__ in runner.invoke(app, ["--version"]).output


def test_doctor_prints_every_kernel_and_json_is_json() -> None:
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0
    found = json.loads(runner.invoke(app, ["doctor", "--json"]).output)
    for kernel in found["kernels"]:
        assert kernel["name"] in done.output
        assert kernel["usable"] == (not kernel["reasons"])
    end = done.output.split("What would gain most here:")[1]
    assert 1 <= len(found["advice"]) <= 2
    for one in found["advice"]:
        assert one["command"] in end
        assert " ".join(one["gain"].split()) in " ".join(end.split())


def test_doctor_requires() -> None:
    assert runner.invoke(app, ["doctor", "--require", "varlen"]).exit_code == 0
    done = runner.invoke(app, ["doctor", "--require", "fp8"])
    assert done.exit_code == 1
    assert "fp8 can't run on this machine" in done.stderr
    assert runner.invoke(app, ["doctor", "--require", "fa2"]).exit_code == 1


def test_a_diagnosis_is_pure_over_a_machine() -> None:
    usable = {kernel.name for kernel in diagnose(CPU).kernels if kernel.usable}
    assert {"varlen", "sdpa", "eager", "s2"} <= usable
    assert not {"flash_attention_2", "sage", "fp8", "xformers"} & usable
    assert {"flash_attention_2", "flash_attention_3"} <= {k.name for k in diagnose(HOPPER).kernels if k.usable}


def test_plan_prints_and_speaks_json(folder: Path) -> None:
    done = runner.invoke(app, ["plan", str(folder)])
    assert done.exit_code == 0
    assert "eager" in done.output
    found = json.loads(runner.invoke(app, ["plan", str(folder), "--json"]).output)
    assert [layer["chosen"] for layer in found["layers"]] == ["eager", "eager"]
    routed = runner.invoke(app, ["plan", str(folder), "--attn", "varlen", "--route", "--json"])
    assert json.loads(routed.output)["on_unsupported"] == "route"


def test_a_plan_keeps_flash_attention_2_where_it_is_asked_to(folder: Path) -> None:
    arguments = ["plan", str(folder), "--attn", "flash_attention_2", "--environment", "sm90", "--json"]
    for more, running in (((), "flash_attention_4"), (("--no-upgrade-flash",), "flash_attention_2")):
        found = json.loads(runner.invoke(app, [*arguments, *more]).output)
        assert found["running"] == {"": running}


def test_a_plan_for_another_machine_with_its_costs_and_flags(folder: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, ["plan", str(folder), "--environment", "sm90", "--seq-len", "4096"])
    assert "flash_attention_3" in done.output
    assert "FLOP forward" in done.output
    assert "attn_supports_packing: true" in done.output
    assert "Assumed on that machine: torch" in done.output
    arguments = ["plan", str(folder), "--environment", "sm90", "--seq-len", "4096", "--json"]
    found = json.loads(runner.invoke(app, arguments).output)
    assert found["flags"]["attn_supports_packing"] is True
    others = {one["backend"]: one for one in found["layers"][1]["alternatives"]}
    assert "after 3" in others["flash_attention_4"]["reasons"][0]
    assert others["eager"]["serves"] is True
    assert others["eager"]["extra_bytes"] == 6 * 4 * 4096**2
    assert found["estimate"]["flops"] == sum(layer["estimate"]["flops"] for layer in found["layers"])
    written = tmp_path / "doctor.json"
    written.write_text(runner.invoke(app, ["doctor", "--json"]).output)
    here = json.loads(runner.invoke(app, ["plan", str(folder), "--environment", str(written), "--json"]).output)
    assert [layer["chosen"] for layer in here["layers"]] == ["eager", "eager"]


@pytest.mark.parametrize("text", ["{", "[]", '{"environment": {}}', '{"device": "cuda", "architecture": "smart"}'])
def test_a_file_that_describes_no_machine_is_one_line_on_stderr(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "machine.json").write_text(text)
    done = runner.invoke(app, ["plan", str(folder), "--environment", str(tmp_path / "machine.json")])
    assert done.exit_code == 1
    assert "machine.json does not describe a machine" in done.stderr
    assert runner.invoke(app, ["plan", str(folder), "--environment", "h100"]).exit_code == 1


def test_doctor_works_without_torch() -> None:
    """A finder that hides torch stands for an environment without it."""
    code = (
        "import sys, importlib.metadata as m, importlib.util as u\n"
        "find, version = u.find_spec, m.version\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "def hidden(name):\n"
        "    if name == 'torch': raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = hidden\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['axattn', 'doctor', '--json']\n"
        "from axattn.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert "torch" not in found["environment"]["libraries"]
    assert [one["command"] for one in found["advice"]] == ["pip install torch"]
    assert {kernel["reasons"][0]["fix"] for kernel in found["kernels"]} == {"pip install torch"}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--attn", "varlen"], "softcap"),
        (["--attn", "fa2"], "flash_attention_2"),
    ],
)
def test_a_users_mistake_is_one_line_on_stderr(folder: Path, arguments: list[str], part: str) -> None:
    done = runner.invoke(app, ["plan", str(folder), *arguments])
    assert done.exit_code == 1
    assert part in done.stderr
    assert "Traceback" not in done.output + done.stderr
    assert done.stdout == ""


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = runner.invoke(app, ["demo"])
    assert done.exit_code == 1
    assert "accelerate is not installed" in done.stderr
    assert 'pip install "axattn[demo]"' in done.stderr


def test_a_folder_without_a_model_is_one_line_on_stderr(tmp_path: Path) -> None:
    done = runner.invoke(app, ["plan", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith("axattn: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert runner.invoke(app, ["plan"]).exit_code == 2
