"""The lines of docs/security.md that no other test holds, and that each line there has its test."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import axattn
from axattn.errors import InvalidConfigError
from axattn.spec import names
from tests import forked
from tests.forked import FORKED
from tests.models import build

pytestmark = FORKED

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "axattn").rglob("*.py"))


def test_every_line_of_the_threat_model_has_a_test() -> None:
    rows = re.findall(r"\| `([\w/]+\.py)(?:::(\w+))?` \|$", (ROOT / "docs" / "security.md").read_text(), re.M)
    assert len(rows) >= 10
    for file, function in rows:
        text = (ROOT / "tests" / file).read_text()
        assert not function or f"def {function}(" in text, (file, function)


def test_a_name_inside_a_checkpoint_is_not_taken(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_attn_implementation": "someone/evil-kernel"}))
    model = axattn.from_pretrained(tmp_path, attn_implementation="varlen")
    assert model.config._attn_implementation == "varlen"
    assert axattn.plan(tmp_path, "auto").running == {"": "auto"}


def test_plug_ins_are_imported_only_when_named(tmp_path: Path) -> None:
    package = tmp_path / "plug_in-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-in\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[axattn.backends]\nsneaky = plug_in:backend\n")
    (tmp_path / "plug_in.py").write_text("print('plug-in imported')\nbackend = None\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    imports = subprocess.run(
        [sys.executable, "-c", "import axattn; print(axattn.registered())"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        check=False,
    )
    assert imports.stdout == "False\n", imports.stderr[-800:]
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import axattn
from axattn.spec import names
from tests.models import build, tokens
names.installed.cache_clear()
model = axattn.apply(build("llama"), "auto")
model(tokens(1, 8)); axattn.plan(model, "auto"); axattn.diagnose(); axattn.status(model)
print("before")
try:
    axattn.apply(model, "sneaky")
except axattn.AxattnError as error:
    print(type(error).__name__)
"""
    done = forked.python(code, folder=tmp_path)
    assert done.stdout.split("\n")[:3] == ["before", "plug-in imported", "BackendUnavailableError"], done.output[-800:]


def test_remote_code_is_never_allowed_by_axattn(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises((ValueError, OSError), match=r"trust_remote_code|custom code"):
        axattn.from_pretrained(tmp_path, attn_implementation="auto")
    for path in SOURCES:
        assert "trust_remote_code=True" not in path.read_text(), path


EVIL = "!!python/object/apply:os.system ['touch owned']"


def test_yaml_builds_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(f"attn_implementation: {EVIL}\n")
    with pytest.raises(InvalidConfigError, match="not YAML"):
        axattn.AttentionConfig.from_yaml(tmp_path / "config.yaml")
    axattn.migrate(f"attn_implementation: {EVIL}\n")
    assert not (tmp_path / "owned").exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(EVIL)


def test_the_source_reads_no_pickles_and_runs_no_text() -> None:
    """No call of what turns bytes or text into running code; the two child processes run fixed commands."""
    banned = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "torch.load", "os.system"}
    banned |= {"yaml.load", "yaml.unsafe_load", "marshal.loads", "shelve.open", "joblib.load", "numpy.load", "np.load"}
    children = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in banned, (path, name)
                if name.startswith("subprocess."):
                    assert "shell" not in ast.unparse(node), path
                    children.append(path.name)
            if (
                isinstance(node, ast.Attribute)
                and node.attr.endswith("Loader")
                and ast.unparse(node).startswith("yaml.")
            ):
                assert node.attr == "SafeLoader", path
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "marshal", "shelve", "socket"}, path
    assert sorted(children) == ["job.py", "kernels.py"]  # the demo's stock Transformers; git rev-parse


SECRETS = {"HF_TOKEN": "hf_secret123", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2", "WANDB_API_KEY": "wandbsecret"}


@pytest.mark.parametrize("verb", ["doctor", "plan", "verify", "bench"])
def test_reports_hold_no_secrets(verb: str, tmp_path: Path) -> None:
    folder = tmp_path / "private-folder" / "my-model"
    build("llama").save_pretrained(folder)
    output = tmp_path / "out.json"
    command = ["axattn", verb, "--json"]
    if verb != "doctor":
        command.append(str(folder))
    if verb == "bench":
        command += ["--attn", "varlen", "--seq-len", "32", "--rounds", "1"]
    code = f"import sys; from axattn.cli import main; sys.argv[:] = {command!r}; main()"
    done = forked.python(code, environment=SECRETS | {"PRIVATE_NOTE": "notforreports"}, folder=tmp_path)
    assert not done.failed, done.result + done.output[-1500:]
    json.loads(done.stdout)
    for secret in (*SECRETS.values(), "notforreports", "private-folder", str(Path.home()), sys.prefix):
        assert len(secret) < 6 or secret not in done.stdout, secret
    assert not output.exists()


def test_nothing_connects_anywhere(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    code = f"""
import socket
def refuse(*a, **k): raise SystemExit("connected")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import axattn
from tests import forked
from tests.models import tokens
axattn.diagnose()
model = axattn.from_pretrained({str(tmp_path / "model")!r}, attn_implementation="auto")
axattn.prepare_for_training(model)
axattn.verify(model)
model(tokens(1, 8)); print(axattn.plan(model), axattn.status(model)); axattn.restore(model)
print("done")
"""
    done = forked.python(code)
    assert done.stdout.rstrip().endswith("done"), done.stderr[-1500:]


def test_names_of_packages_are_never_those_of_axattn_backends() -> None:
    found: Any = names.installed()
    assert not set(found) & set(names.CANONICAL)
