"""What a release and the forge read agrees with the package: version, metadata, workflows, forms."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from typer.testing import CliRunner

import axattn
from axattn.cli import app

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github").rglob("*.yml"))
COMMUNITY = [
    *FORMS,
    *(ROOT / ".github").glob("*.md"),
    ROOT / "SECURITY.md",
    ROOT / "CODE_OF_CONDUCT.md",
    ROOT / "CITATION.cff",
]


def test_the_version_is_the_one_that_was_built() -> None:
    assert str(Version(axattn.__version__)) == axattn.__version__  # PEP 440, normalised
    assert axattn.__version__ == importlib.metadata.version("axattn")
    assert "__version__" in dir(axattn)


def test_a_copied_package_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert axattn.__version__ == "0+unknown"
    assert Version("0+unknown") < Version("0.1.0.dev0")


def test_citation_and_pyproject_agree() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["title"] == PROJECT["name"]
    assert cited["abstract"] == PROJECT["description"]
    assert cited["license"] == PROJECT["license"]
    assert cited["keywords"] == PROJECT["keywords"]
    assert cited["authors"] == PROJECT["authors"]
    assert cited["repository-code"] == REPOSITORY
    assert cited["url"] == PROJECT["urls"]["Homepage"]
    assert "version" not in cited  # it would be the last release's


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_exists(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    used = [target for command in commands for target in re.findall(r"\bmake ([\w-]+)", command)]
    assert used
    assert set(used) <= targets
    for module in (found for command in commands for found in re.findall(r" -m ([\w.]+)", command)):
        assert module == "gpu" or importlib.util.find_spec(module), module


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read_but_for_what_a_job_states(workflow: Path) -> None:
    read = yaml.safe_load(workflow.read_text())
    assert read["permissions"] == {"contents": "read"}
    assert read["concurrency"]["group"]
    for name, job in read["jobs"].items():
        assert job["timeout-minutes"], name
        writes = {what for what, how in job.get("permissions", {}).items() if how == "write"}
        assert not writes or "make" not in str(job["steps"]), f"{name} runs the code of the project with {writes}"
    for step in steps(workflow):
        action, _, version = step.get("uses", "@v0").partition("@")
        assert re.fullmatch(r"v\d+|release/v\d+", version), (action, version)


def test_pythons_of_workflows_are_those_of_the_metadata() -> None:
    declared = {found[1] for text in PROJECT["classifiers"] if (found := re.search(r"Python :: (3\.\d+)$", text))}
    tested = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["tests"]
    pythons = tested["strategy"]["matrix"]["python"]
    assert set(pythons) <= declared
    assert sorted([min(declared, key=Version), max(declared, key=Version)]) == sorted(pythons)
    assert PROJECT["requires-python"] == f">={min(declared, key=Version)}"


def test_beta_stands_on_a_nightly_run_of_the_newest_transformers() -> None:
    nightly = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    runs = [step.get("run") for job in nightly["jobs"].values() for step in job["steps"]]
    assert "Development Status :: 4 - Beta" in PROJECT["classifiers"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", nightly[True]["schedule"][0]["cron"])  # YAML 1.1 reads `on` as true
    assert {"make newest", "make nightly"} <= set(runs)


@pytest.mark.parametrize("page", COMMUNITY, ids=lambda path: path.name)
def test_pages_name_the_repository_and_commands_that_exist(page: Path) -> None:
    text = page.read_text()
    for repository in re.findall(r"https://github\.com/[\w.-]+/axattn\b", text):
        assert repository == REPOSITORY
    for path in re.findall(rf"{REPOSITORY}/blob/main/([\w./-]+\w)", text):
        assert (ROOT / path).exists(), path
    for verb, flags in re.findall(r"`axattn (\w+)((?: [\w-]+)*)`", text):
        done = CliRunner().invoke(app, [verb, "--help"], terminal_width=200)
        assert done.exit_code == 0, verb
        for flag in re.findall(r"--[\w-]+", flags):
            assert flag in done.output, (verb, flag)


def test_issue_forms_about_a_fault_or_a_kernel_require_the_doctors_report() -> None:
    for name in ("bug", "kernel"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        (field,) = (part for part in form["body"] if part.get("id") == "doctor")
        assert "axattn doctor --json" in field["attributes"]["description"]
        assert field["validations"]["required"]
