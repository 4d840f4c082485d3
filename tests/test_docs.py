"""The docs are true: their code runs, their errors are axattn's, their examples work on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import axattn
from axattn.spec import names
from tests import forked
from tests.forked import FORKED
from tests.models import build
from website import recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
GOES_ON = "# after the lines above\n"
"""The first line of code on a page that needs the code before it."""


def snippets(page: Path) -> list[str]:
    """The code of a page; what goes on from other code is one piece with it."""
    found: list[str] = []
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        found.append(found.pop() + code if code.startswith(GOES_ON) else code)
    return found


def interpreted(code: str, folder: Path) -> forked.Ended:
    """Code that chooses Triton's interpreter, which only a process that has not imported triton can."""
    pytest.importorskip("sageattention")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return forked.Ended("", done.returncode != 0, done.stdout, done.stderr)


CODE = [
    pytest.param(code, id=f"{page.stem}-{number}", marks=pytest.mark.nightly if "TRITON_INTERPRET" in code else ())
    for page in PAGES
    for number, code in enumerate(snippets(page))
]


@FORKED
@pytest.mark.parametrize("code", CODE)
def test_code_in_the_docs_runs(code: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "my-model")
    done = interpreted(code, tmp_path) if "TRITON_INTERPRET" in code else forked.python(code, folder=tmp_path)
    assert not done.failed, done.result + done.output[-2000:]
    if promised := re.findall(r"# → (.*)", code):  # a page that says what its code prints
        assert done.stdout.splitlines() == promised


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page", [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_the_files_that_the_map_of_the_code_names_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`((?:axattn|benchmarks|hub_kernel|tests|website)/[\w./-]*|axattn_autoload\.py)`", text)
    assert len(named) > 10
    assert not [name for name in named if not re.search("NAME|SUBJECT", name) and not (ROOT / name).exists()]


def test_every_package_is_on_the_map_of_the_code() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "axattn").iterdir():
        if (path / "__init__.py").exists() or (path.suffix == ".py" and not path.name.startswith("__")):
            assert f"](../axattn/{path.name})" in text, path.name


def test_every_name_and_legacy_flag_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "attention.md").read_text()
    for name in (*names.AXATTN_BACKENDS, "eager", "sdpa", "flex_attention", *names.LEGACY_FLAGS):
        assert f"`{name}`" in text, name


def test_every_error_in_the_list_is_one_that_the_source_raises() -> None:
    source = "".join(path.read_text() for path in (ROOT / "axattn").rglob("*.py"))
    flat = re.sub(r'"\s*\n\s*f?"', "", source)
    for row in re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M):
        for part in (piece.strip(" '") for piece in row.split("…")):
            assert not part or part in flat, (row, part)


def test_every_class_of_error_is_in_the_list() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for name in (name for name in axattn.__all__ if name.endswith("Error")):
        assert f"`{name}`" in text or f"`axattn.{name}`" in text, name


def example(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An example run by its path, from elsewhere, with axattn installed and nothing else of the checkout to import."""
    (folder / "site").mkdir()
    (folder / "site" / "axattn").symlink_to(ROOT / "axattn")
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder / "site"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, check=False)


def forked_example(name: str, folder: Path, *arguments: str) -> forked.Ended:
    """The same, in a process that has imported axattn."""
    path = ROOT / "examples" / f"{name}.py"
    return forked.script(path, *arguments, folder=folder, environment={"CUDA_VISIBLE_DEVICES": ""})


IN_MINUTES = ("trainer", "lora", "sft", "several_kernels", "evaluate")
"""The examples that `make test` runs."""


def without_numbers(text: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?", "N", text)


@pytest.mark.nightly
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_examples_run(name: str, tmp_path: Path) -> None:
    for package in recipes.NEEDS.get(name, ()):
        pytest.importorskip(package)
    done = example(name, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert without_numbers(recipes.shown(done.stdout)) == without_numbers(recipes.recorded()[name])


@FORKED
@pytest.mark.parametrize("name", IN_MINUTES)
def test_examples_do_what_they_show(name: str, tmp_path: Path) -> None:
    done = forked_example(name, tmp_path)
    assert not done.failed, done.result + done.output[-2000:]
    assert without_numbers(recipes.shown(done.stdout)) == without_numbers(recipes.recorded()[name])


def test_the_page_of_recipes_is_made_of_the_examples() -> None:
    others = {"small", "ms_swift"}  # their data, and a plugin file
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*recipes.RECIPES, *others}
    assert recipes.PAGE.read_text() == recipes.page(recipes.recorded()), "stale: run python -m website.recipes"


@FORKED
def test_an_example_explains_its_arguments(tmp_path: Path) -> None:
    done = forked_example("trainer", tmp_path, "--help")
    assert not done.failed, done.result + done.output[-2000:]
    assert "MODEL_FOLDER" in done.output
    assert "python examples/trainer.py" in done.output


def test_a_third_partys_kernel_is_found_planned_and_right(tmp_path: Path) -> None:
    folder = ROOT / "examples" / "third_party"
    entry = re.search(r'^my_kernel = "(.*)"$', (folder / "pyproject.toml").read_text(), re.M)
    assert entry is not None
    metadata = tmp_path / "site" / "my_kernel-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-kernel\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[axattn.backends]\nmy_kernel = {entry[1]}\nflash_of_mine = x:Y\n")
    build("mistral").save_pretrained(tmp_path / "my-model")
    code = (
        "import json, axattn\n"
        "from axattn.spec import names\n"
        "found = axattn.verify('my-model', 'my_kernel')\n"
        "config = axattn.AttentionConfig(attn_implementation='my_kernel', sample_packing=True)\n"
        "plan = axattn.plan('my-model', 'my_kernel')\n"
        "print(json.dumps([found.to_dict(), config.attn_supports_packing, names.installed(), plan.layers[0].chosen]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(tmp_path / "site")])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, packs, installed, chosen = json.loads(done.stdout.splitlines()[-1])
    assert found["right"], found
    assert found["kernels"].keys() == {"my_kernel"}
    assert {check["outcome"] for check in found["checks"]} == {"ok"}
    assert packs
    assert installed == ["my_kernel"]  # a name with "flash" in it would be Transformers'
    assert chosen == "my_kernel"


def test_the_third_partys_kernel_is_short() -> None:
    assert len((ROOT / "examples" / "third_party" / "my_kernel.py").read_text().splitlines()) < 40


def test_the_page_of_numbers_is_made_from_the_committed_ones() -> None:
    from benchmarks import page

    assert page.PAGE.read_text() == page.page(), "run python -m benchmarks.page"
    text = page.README.read_text()
    assert text == page.readme(text), "run python -m benchmarks.page"
    assert page.PLOT.exists()


def test_the_picture_shows_what_is_measured_now() -> None:
    from benchmarks import picture

    for mode, made in picture.pictures().items():
        assert picture.picture_path(mode).read_text() == made, "run python -m benchmarks.picture"
