"""Reads the source of Transformers' models: what a class does that neither its config nor its signature tells.

A text says other things once somebody writes it anew. So what a part of a model can show in a run (`axattn.hf.probes`:
losses, numbering, pooling, mixing) is asked there too, and rows of several sequences are refused where the two differ.
Only the text serves for what a layer would have to run for, or a whole model:

- that fails closed, a text not understood being a no: ``passes_positions_to_masks``, ``flash_guard``'s keywords of
  an attention module (packed rows are refused), ``recurrent`` (such a layer then counts as one that mixes tokens),
  ``input_hooks.hands_on`` (an input hook more), ``input_hooks._planes`` (positions of that shape are refused),
  ``entrance.wants_cache`` (a batch stays padded);
- what attention layers do: ``counting_layers``; which mask functions a model calls: ``flash_guard.contradictions``,
  ``flash_guard.overlays`` (both asked only on names that Transformers serves itself);
- what is asked before there is a model: ``needs`` (each call is checked again by what it brings), ``classes``;
- whether a class is one of attention at all (`calls_interface`), or one that only adds to another (`origin`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from types import CodeType
from typing import Any

from axattn.hf.weak_cache import weak_cache


def code_of(module: Any) -> Any:
    """The class whose source says what a module does (`origin` of its own)."""
    own: Any = type(module)
    return origin(own)


def origin(cls: Any) -> Any:
    """What a class is made of: Transformers' own under one that only adds to it, else the class itself.

    A user's subclass adds to it if its ``forward`` calls ``super()``, or if it has none; FSDP2 makes such a class too.
    """
    return cls.__mro__[_origin(cls)]


@weak_cache
def _origin(cls: Any) -> int:
    """Where the origin of a class stands among its bases (the class itself would be kept alive by its own answer)."""
    for index, one in enumerate(cls.__mro__):
        if one.__module__.startswith("transformers.models."):
            return index
        own = vars(one).get("forward")
        if own is not None and "super()" not in source_of(own):
            return index
    return 0


def is_named(module: Any, endings: tuple[str, ...]) -> bool:
    """Whether the name of a module's class, or of one that it derives from, ends like this."""
    return any(cls.__name__.endswith(endings) for cls in type(module).__mro__)


def signature_of(module: Any) -> inspect.Signature:
    """That of a module's ``forward``; of the one it hands ``*args`` on to, where it only does that."""
    signature = inspect.signature(inspect.unwrap(type(module).forward))
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return inspect.signature(inspect.unwrap(code_of(module).forward))
    return signature


@weak_cache
def source_of(function: Any) -> str:
    """The text of a function (of a class's ``forward``), under its decorators; "" where there is none to read."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""


@weak_cache
def is_readable(cls: Any) -> bool:
    """Whether the ``forward`` of a module class has a text to read; a class made by ``exec`` has none."""
    return cls.__module__.startswith("torch.") or bool(source_of(cls.forward))


@functools.cache
def file_source(module: str) -> str:
    """The text of an imported module's file, "" where there is none to read."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


@weak_cache
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


def calls_interface(cls: Any) -> bool:
    """Whether a module class calls Transformers' attention interface in its own ``forward``."""
    return "ALL_ATTENTION_FUNCTIONS" in used_in_forward(cls)


@weak_cache
def used_in_forward(cls: Any) -> frozenset[str]:
    """The globals and attributes that the ``forward`` of a class uses by name."""
    cls = origin(cls)
    forward = cls.__dict__.get("forward") or getattr(cls, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return frozenset() if code is None else frozenset(code.co_names)


@weak_cache
def _inner_code(cls: Any) -> tuple[CodeType | None, tuple[str, ...], str]:
    """The code of a model class's own ``forward`` below its decorators, its parameters, the name of ``**kwargs``."""
    code = getattr(inspect.unwrap(origin(cls).forward), "__code__", None)
    if code is None:
        return None, (), ""
    count = code.co_argcount + code.co_kwonlyargcount
    rest = count + bool(code.co_flags & inspect.CO_VARARGS)
    spread = code.co_varnames[rest] if code.co_flags & inspect.CO_VARKEYWORDS else ""
    return code, code.co_varnames[1:count], spread


def inputs_in_frame(module: Any) -> dict[str, Any] | None:
    """The inputs, by name, of a model's ``forward`` that leads to this call, as they are now; None if none is found."""
    cls: Any = type(module)
    code, names, spread = _inner_code(cls)
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code and code is not None and frame.f_locals.get(code.co_varnames[0]) is module:
            here = frame.f_locals
            return {name: here[name] for name in names if name in here} | dict(here.get(spread) or {})
        frame = frame.f_back
    return None
