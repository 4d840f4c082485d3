"""Put the hub kernel together: ``python -m hub_kernel.make [FOLDER]`` (``make hub-kernel``).

Writes ``build/hub-kernel/int8-flash-attn``: a project as kernel-builder takes it (build.toml, torch-ext) that is built
already (a folder per variant under ``build/``, as ``kernels`` loads it), the card and the licence. Imports no axattn.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "hub-kernel"
WRITTEN = Path(__file__).resolve().parent / "int8-flash-attn"
"""What is written by hand."""


class Taken(NamedTuple):
    """A module of axattn that the package has a copy of.

    Attributes:
        module: its dotted name.
        only: the functions and classes that are taken, with the imports that they use; empty: the whole module.
        replaced: texts, each once in it, and what stands there in the copy.
        docstring: that of the copy; empty: the module's own.
    """

    module: str
    only: tuple[str, ...] = ()
    replaced: tuple[tuple[str, str], ...] = ()
    docstring: str = ""


TAKEN = (
    Taken("axattn.hf.transfers"),
    Taken(
        "axattn.hf.torch_internals",
        only=("flash_forward", "flash_backward"),
        docstring="torch's own flash attention operators, which have private names.",
    ),
    Taken("axattn.kernels.hadamard"),
    Taken("axattn.kernels.document_statistics"),
    Taken("axattn.kernels.int8_attention"),
    Taken(
        "axattn.backends.varlen_engine.flash_backward",
        only=("Packed", "exact_forward", "flash_backward"),
    ),
    Taken(
        "axattn.backends.int8_operator",
        replaced=(
            ('custom_op("axattn::int8_attention",', 'custom_op(add_op_namespace_prefix("int8_attention"),'),
            ("\nimport torch\n\n", "\nimport torch\n\nfrom ._ops import add_op_namespace_prefix\n"),
            ('"""`axattn::int8_attention`: the', '"""The'),
        ),
    ),
)
INSTEAD = {"axattn.backends.varlen_engine.packed_on_cpu": "packed_on_cpu"}
"""Modules of axattn in whose place the package has one that is written by hand."""

OLDER = "universal"
"""The variant of kernels before they had one per backend; later ones take it where no other fits."""
_OPS = '''"""The namespace of this build's operators: several builds can be loaded in one process."""

import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's name in the namespace of this build."""
    return f"{id}::{{op_name}}"
'''
_NESTED = '''"""The kernel by the path at which ``kernels`` looked before build variants were packages themselves."""

import importlib.util
import sys
from pathlib import Path

_NAME = "{id}_nested"
_SPEC = importlib.util.spec_from_file_location(_NAME, Path(__file__).resolve().parents[1] / "__init__.py")
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules[_NAME] = _MODULE
_SPEC.loader.exec_module(_MODULE)
globals().update({{name: getattr(_MODULE, name) for name in _MODULE.__all__}})
__all__ = list(_MODULE.__all__)
'''


def sources() -> dict[str, str]:
    """The modules of the package and their texts: those written by hand and the copies."""
    written = {path.name: path.read_text() for path in sorted((WRITTEN / "torch-ext").rglob("*.py"))}
    copies = {f"{_local(taken.module)}.py": copied(taken) for taken in TAKEN}
    twice = set(written) & set(copies)
    if twice:
        raise ValueError(f"both written by hand and taken: {sorted(twice)}")
    return {**written, **copies}


def copied(taken: Taken) -> str:
    """The text of a module of the package that is taken from axattn.

    Raises:
        ValueError: it imports a module of axattn that the package does not have, a name of `taken.only` does not exist
            or uses one that is not taken, or a text to be replaced is not in it exactly once.
    """
    path = ROOT / f"{taken.module.replace('.', '/')}.py"
    text = path.read_text()
    for old, new in taken.replaced:
        if text.count(old) != 1:
            raise ValueError(f"{taken.module}: {old!r} is in it {text.count(old)} times, not once")
        text = text.replace(old, new)
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    body = _part(tree, lines, taken) if taken.only else _whole(tree, lines)
    return f"# Made by `make hub-kernel` from {path.relative_to(ROOT)}; do not edit.\n{body}"


def _whole(tree: ast.Module, lines: list[str]) -> str:
    """A module's text, comments and all, with imports that are relative."""
    for node in reversed(tree.body):  # from the end, so that the lines before stay where they are
        if relative := _relative(node):
            lines[node.lineno - 1 : node.end_lineno] = [relative]
    return "".join(lines)


def _part(tree: ast.Module, lines: list[str], taken: Taken) -> str:
    """The text of the functions and classes that are taken, below their imports."""
    docstring = f'"""{taken.docstring}"""\n' if taken.docstring else "".join(lines[: tree.body[0].end_lineno])
    found, before = [docstring], tree.body[0]
    for node in _chosen(tree, taken):
        defines = isinstance(node, ast.FunctionDef | ast.ClassDef)
        apart = any(not line.strip() for line in lines[(before.end_lineno or 0) : node.lineno - 1])
        text = _relative(node) or "".join(lines[_start(node) - 1 : node.end_lineno])
        found.append("\n" * (2 if defines else apart) + text)
        before = node
    return "".join(found)


def _chosen(tree: ast.Module, taken: Taken) -> list[ast.stmt]:
    """The named functions and classes of a module, and the imports that they use."""
    named = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    if absent := set(taken.only) - set(named):
        raise ValueError(f"{taken.module} has no {sorted(absent)}")
    chosen = [named[name] for name in taken.only]
    used = {n.id for node in chosen for n in ast.walk(node) if isinstance(n, ast.Name)}
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) and (_bound(n) & used or _future(n))]
    bound = {name for node in imports for name in _bound(node)} | set(taken.only)
    top_level = set(named) | {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}  # type: ignore[attr-defined]
    if missing := (used & top_level) - bound:
        raise ValueError(f"{taken.module}: {sorted(missing)} are used and not taken")
    return [*imports, *chosen]


def _bound(node: ast.Import | ast.ImportFrom) -> set[str]:
    return {alias.asname or alias.name.partition(".")[0] for alias in node.names}


def _future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _start(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def _local(module: str) -> str:
    """The name in the package of a module of axattn."""
    known = {**{taken.module: taken.module.rpartition(".")[2] for taken in TAKEN}, **INSTEAD}
    if module not in known:
        raise ValueError(f"the package has no copy of {module}")
    return known[module]


def _relative(node: ast.stmt) -> str | None:
    """An import of axattn as one inside the package; None for anything else."""
    if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").partition(".")[0] != "axattn":
        return None
    try:
        here = f".{_local(str(node.module))}"
        names = [alias.name for alias in node.names]
    except ValueError:  # `from axattn.kernels import int8_attention`: modules
        here, names = ".", [_local(f"{node.module}.{alias.name}") for alias in node.names]
    bound = (f" as {alias.asname}" if alias.asname else "" for alias in node.names)
    return f"from {here} import {', '.join(map(str.__add__, names, bound))}\n"


def make(folder: Path = FOLDER) -> Path:
    """Write the kernel's folder, anew, into `folder`; returns its path."""
    settings = tomllib.loads((WRITTEN / "build.toml").read_text())
    general, modules = settings["general"], sources()
    target = folder / general["name"]
    shutil.rmtree(target, ignore_errors=True)
    package = general["name"].replace("-", "_")
    _write(target / "torch-ext" / package, modules)
    for name in ("build.toml", "README.md"):
        shutil.copyfile(WRITTEN / name, target / name)
    shutil.copyfile(ROOT / "LICENSE", target / "LICENSE")
    state = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in sorted(modules.items())).encode()).hexdigest()
    for backend in (*general["backends"], OLDER):
        variant, identity = target / "build" / f"torch-{backend}", f"_{package}_{backend}_{state[:7]}"
        _write(variant, {**modules, "_ops.py": _OPS.format(id=identity)})
        _write(variant / package, {"__init__.py": _NESTED.format(id=identity)})
        metadata = _metadata(settings, backend, identity, variant)
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


def _write(folder: Path, modules: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in modules.items():
        (folder / name).write_text(text)


def _metadata(settings: dict[str, Any], backend: str, identity: str, variant: Path) -> dict[str, Any]:
    """The ``metadata.json`` of a variant (kernels' docs/source/kernel-requirements.md, "Kernel metadata")."""
    general, shown = settings["general"], "cuda" if backend == OLDER else backend  # metadata know no "universal"
    archs = {"archs": settings["torch-noarch"]["cuda_capabilities"]} if shown == "cuda" else {}
    files = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*.py"))
    }
    return {
        "id": identity,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": shown, **archs},
        "digest": {"algorithm": "sha256", "files": files},
    }


def main() -> None:
    """Write the folder and say how it is used."""
    parser = argparse.ArgumentParser(description="Put the hub kernel together.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    path = make(parser.parse_args().folder)
    repository = tomllib.loads((WRITTEN / "build.toml").read_text())["general"]["hub"]["repo-id"]
    print(f"{path}\nTry it: LOCAL_KERNELS={repository}={path}, then attn_implementation={repository!r}.")


if __name__ == "__main__":
    main()
