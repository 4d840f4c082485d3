"""Reads the source of Transformers' models: behaviour that neither the config nor the signature shows.

Source changes. So whatever can be tested by running a part of a model (`axattn.hf.probes`: losses, position ids,
pooling, token mixing) is tested there too, and packed rows are refused if the two answers differ. Only the source is
used for answers that would need a layer or a whole model to run:

- answers that fail closed (unreadable source means no): `axattn.traits.mask_makers.passes_positions_to_masks` and
  `axattn.documents.native_flash_guard.passes_keywords` (packed rows are refused), `axattn.traits.recurrent` (the layer
  counts as a token mixer), `axattn.patches.input_hooks.passes_inputs_on` (one more input hook), M-RoPE planes in
  `axattn.traits.model_traits` (such positions are refused), `axattn.patches.forward_wrapper.wants_cache` (a batch stays
  padded);
- what attention layers do (`axattn.traits.position_ids.counting_layers`), and which mask functions a model calls on
  native names (`axattn.traits.native_names`);
- answers needed before the model exists: `axattn.traits.layer_needs` (each call is checked again),
  `axattn.planning.model_classes`;
- whether a class is an attention class (`calls_interface`), or only extends another (`origin`).
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
    """The class whose source defines what a module does (`origin` of its class)."""
    own: Any = type(module)
    return origin(own)


def origin(cls: Any) -> Any:
    """The class that defines the behaviour: Transformers' class if `cls` only extends it, else `cls` itself.

    A subclass extends it if its ``forward`` calls ``super()``, or if it defines none, as the classes made by FSDP2.
    """
    return cls.__mro__[_origin(cls)]


@weak_cache
def _origin(cls: Any) -> int:
    """The index of the origin in the class's MRO (caching the class itself would keep it alive)."""
    for index, one in enumerate(cls.__mro__):
        if one.__module__.startswith("transformers.models."):
            return index
        own = vars(one).get("forward")
        if own is not None and "super()" not in source_of(own):
            return index
    return 0


def is_named(module: Any, endings: tuple[str, ...]) -> bool:
    """Whether the name of a module's class or of a base class has one of these endings."""
    return any(cls.__name__.endswith(endings) for cls in type(module).__mro__)


def signature_of(module: Any) -> inspect.Signature:
    """The signature of a module's ``forward``; if that takes ``*args``, of its origin's."""
    signature = inspect.signature(inspect.unwrap(type(module).forward))
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return inspect.signature(inspect.unwrap(code_of(module).forward))
    return signature


@weak_cache
def source_of(function: Any) -> str:
    """The source of a function without its decorators' wrappers; "" if it has none."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""


@weak_cache
def is_readable(cls: Any) -> bool:
    """Whether the ``forward`` of a module class has source; a class made by ``exec`` has none."""
    return cls.__module__.startswith("torch.") or bool(source_of(cls.forward))


@functools.cache
def file_source(module: str) -> str:
    """The source of an imported module's file, "" if it has none."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


@weak_cache
def tree_of(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function, None if it can't be read. It is cached: don't change it."""
    try:
        found = ast.parse(source_of(function)).body
    except SyntaxError:
        return None
    return found[0] if found and isinstance(found[0], ast.FunctionDef) else None


def calls_of(function: Any, name: str | None = None) -> list[ast.Call]:
    """The calls in a function, of `name` ("self.loss_function") or all; empty if it can't be read."""
    tree = tree_of(function)
    calls = [] if tree is None else [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if name is None or ast.unparse(call.func) == name]


def calls_interface(cls: Any) -> bool:
    """Whether the ``forward`` of a module class calls Transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in used_in_forward(cls)


@weak_cache
def used_in_forward(cls: Any) -> frozenset[str]:
    """The names of the globals and attributes that the ``forward`` of a class uses."""
    cls = origin(cls)
    forward = cls.__dict__.get("forward") or getattr(cls, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return frozenset() if code is None else frozenset(code.co_names)


@weak_cache
def _inner_code(cls: Any) -> tuple[CodeType | None, tuple[str, ...], str]:
    """The code of a model class's undecorated ``forward``, its parameters, and the name of its ``**kwargs``."""
    code = getattr(inspect.unwrap(origin(cls).forward), "__code__", None)
    if code is None:
        return None, (), ""
    count = code.co_argcount + code.co_kwonlyargcount
    rest = count + bool(code.co_flags & inspect.CO_VARARGS)
    spread = code.co_varnames[rest] if code.co_flags & inspect.CO_VARKEYWORDS else ""
    return code, code.co_varnames[1:count], spread


def inputs_in_frame(module: Any) -> dict[str, Any] | None:
    """The current inputs, by name, of the model's ``forward`` among the callers; None if there is none."""
    cls: Any = type(module)
    code, names, spread = _inner_code(cls)
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code and code is not None and frame.f_locals.get(code.co_varnames[0]) is module:
            values = frame.f_locals
            return {name: values[name] for name in names if name in values} | dict(values.get(spread) or {})
        frame = frame.f_back
    return None
