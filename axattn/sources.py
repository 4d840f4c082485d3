"""Reads the source of Transformers' models: what a class does that neither its config nor its signature tells."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from typing import Any


@functools.cache
def source_of(function: Any) -> str:
    """The text of a function (of a class's ``forward``), under its decorators; "" where there is none to read."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""


@functools.cache
def file_source(module: str) -> str:
    """The text of an imported module's file, "" where there is none to read."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


@functools.cache
def tree_of(function: Any) -> ast.FunctionDef | None:
    """A function as a syntax tree, None where it can't be read. It is shared: do not change it."""
    try:
        found = ast.parse(source_of(function)).body
    except SyntaxError:
        return None
    return found[0] if found and isinstance(found[0], ast.FunctionDef) else None


def calls_of(function: Any, name: str | None = None) -> list[ast.Call]:
    """The calls in a function, of `name` ("self.loss_function") or all; empty where it can't be read."""
    tree = tree_of(function)
    calls = [] if tree is None else [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if name is None or ast.unparse(call.func) == name]


@functools.cache
def calls_interface(cls: Any) -> bool:
    """Whether a module class calls Transformers' attention interface in its own ``forward``."""
    forward = cls.__dict__.get("forward") or getattr(cls, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
