"""Copies of Transformers' modeling files whose forwards call an input by another word. No test lives here."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

STEM = "tests_renamed_"


def renamed(family: str, words: dict[str, str], folder: Path) -> ModuleType:
    """The modeling file of a family with other words for some inputs, imported from a file of its own.

    What Transformers' own functions (mask builders, outputs) are given keeps its name: they live elsewhere.

    Args:
        family: as in ``transformers.models``.
        words: the new word for each input of a ``forward``.
        folder: where the file is written.
    """
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = module.__name__.rsplit(".", node.level)[0]
            node.module, node.level = f"{package}.{node.module}" if node.module else package, 0
    tree = ast.fix_missing_locations(_Rename(words).visit(tree))
    name = f"{STEM}{family}_{'_'.join(words.values())}"
    path = folder / f"{name}.py"
    path.write_text(ast.unparse(tree))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


class _Rename(ast.NodeTransformer):
    def __init__(self, words: dict[str, str]) -> None:
        self.words = words

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        # `deprecate_kwarg` would let the old word in, `auto_docstring` asks for a text for the new one
        left_out = ("deprecate_kwarg", "auto_docstring")
        node.decorator_list = [one for one in node.decorator_list if not ast.unparse(one).startswith(left_out)]
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        node.decorator_list = [one for one in node.decorator_list if "auto_docstring" not in ast.unparse(one)]
        if not node.name.endswith("RotaryEmbedding"):  # a decorator of Transformers names its inputs
            self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> Any:
        node.arg = self.words.get(node.arg, node.arg)
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        node.id = self.words.get(node.id, node.id)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        own = called.startswith("self.") and called != "self.rotary_emb"
        if own or called in ("decoder_layer", "layer_module", "encoder_layer"):
            for keyword in node.keywords:
                keyword.arg = self.words.get(keyword.arg or "", keyword.arg)
        return node
