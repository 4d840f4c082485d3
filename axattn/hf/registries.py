"""Who stands in Transformers' registries of attention and mask functions under our names, looked up as its models do.

Nothing is written to them here: `axattn.attention.registration` does that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from axattn.errors import Reason, RegistrationError
from axattn.hf import own_functions
from axattn.hf.model_internals import CONFIG_NAME
from axattn.hf.source_inspection import origin

KINDS = ("attention", "mask")
_interfaces: list[Any] = []  # no functools.cache, which torch.compile looks through
_axattn_functions: dict[str, tuple[Any, Any]] = {}  # by name: attention function, mask function


def interfaces() -> list[Any]:
    """The instances of ``AttentionInterface`` and ``AttentionMaskInterface`` that models read. Imports Transformers."""
    if not _interfaces:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        _interfaces[:] = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return _interfaces


def axattn_functions() -> dict[str, tuple[Any, Any]]:
    """By name, the attention function and the mask function of axattn's. The same objects on every call."""
    if not _axattn_functions:
        interfaces()  # before axattn's own modules: nobody who imports Transformers in another thread then waits for us
        _axattn_functions.update(own_functions.load())
    return _axattn_functions


def registered_function(interface: Any, name: str) -> Any:
    """The function that Transformers takes for a name: an instance's own (``interface[name] = f``) before everybody's.

    None when there is none.
    """
    local = interface._local_mapping
    return local[name] if name in local else interface._global_mapping.get(name)


def holds_axattn(name: str) -> bool:
    """Whether both functions under a name are axattn's."""
    attention, masks = _interfaces or interfaces()
    function, mask = _axattn_functions[name] if _axattn_functions else axattn_functions()[name]
    return _is(registered_function(attention, name), function) and registered_function(masks, name) is mask


def _is(found: Any, function: functools.partial[Any]) -> bool:
    """Whether what stands in the registry of attention functions is this one of axattn's."""
    if not torch.compiler.is_compiling():
        return found is function
    # torch.compile can't say whether two partials are the same one, but compares their parts. What is read here guards
    # the graph, so it is traced anew, and refused, once another package has registered the name.
    return getattr(found, "func", None) is function.func and found.args == function.args and not found.keywords


def foreign(name: str, found: Iterable[tuple[str, Any]] = ()) -> list[Reason]:
    """Which functions under a name of axattn's are another package's, and whose; empty when none is.

    Args:
        name: the name.
        found: kind and function; those of Transformers' shared instances when empty.
    """
    looked_up = tuple(found) or [
        (kind, registered_function(interface, name)) for kind, interface in zip(KINDS, interfaces(), strict=True)
    ]
    return [
        Reason("name", f"{kind} {name!r} is held by {described(function)}")
        for kind, function in looked_up
        if function is not None and not of_axattn(function)
    ]


def of_axattn(function: Any) -> bool:
    """Whether axattn made a function, in this import or in an earlier one that is no longer in ``sys.modules``."""
    if isinstance(function, functools.partial) and (len(function.args) != 1 or function.keywords):
        return False  # somebody else's partial of one of ours
    module = getattr(getattr(function, "func", function), "__module__", None) or ""
    return module.partition(".")[0] == "axattn"


def described(function: Any) -> str:
    """Module and qualified name of a function, of what a ``functools.partial`` is made of, or of an object's class."""
    if isinstance(function, functools.partial):
        return f"functools.partial({described(function.func)})"
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or '?'}.{name}"


def require_free(names: Iterable[str], model: str) -> None:
    """Raise where a name of axattn's among these is another package's.

    Raises:
        RegistrationError: who holds it, and what to type instead.
    """
    for name in names:
        reasons = foreign(name) if name in axattn_functions() else []
        if reasons:
            raise _held(name, model, reasons)


def require_own_file(name: str, layer: str, cls: Any) -> None:
    """Raise where the file of an attention module has a registry of its own, with another package's function in it.

    Args:
        name: a name of axattn's.
        layer: for people.
        cls: the module's class.

    Raises:
        RegistrationError: as `require_free`.
    """
    forward = inspect.unwrap(origin(cls).forward)
    interface = getattr(forward, "__globals__", {}).get("ALL_ATTENTION_FUNCTIONS")
    if interface is not interfaces()[0] and hasattr(interface, "_local_mapping"):
        reasons = foreign(name, [(f"in {forward.__module__}, attention", registered_function(interface, name))])
        if reasons:
            raise _held(name, layer, reasons)


def require_registered(module: Any) -> None:
    """Raise where the model of a forward that begins is on a name of axattn's that is no longer axattn's.

    Raises:
        RegistrationError: another package has registered the name since, or it was taken out.
    """
    name = name_of(module.config)
    if name in (_axattn_functions or axattn_functions()) and not holds_axattn(name):
        model = type(module).__name__
        reasons = foreign(name)
        if reasons:
            raise _held(name, model, reasons)
        text = f"{name!r} is not in Transformers' registries as this import of axattn put it there"
        raise RegistrationError(
            f"{name} can't serve {model}", [Reason("name", text)], "Call axattn.register(), or axattn.restore(model)."
        )


def attends(config: Any) -> bool:
    """Whether no other package's attention function will be given the mask that is made for a config."""
    name = name_of(config)
    return name not in axattn_functions() or _is(
        registered_function(interfaces()[0], name), axattn_functions()[name][0]
    )


def require_mask(name: str, layer: str) -> None:
    """Raise where another package has registered its mask function over axattn's, and not its attention function.

    Raises:
        RegistrationError: as `require_free`.
    """
    if name in axattn_functions() and registered_function(interfaces()[1], name) is not axattn_functions()[name][1]:
        reasons = foreign(name)
        if reasons:
            raise _held(name, layer, reasons)


def name_of(config: Any) -> Any:
    """The name that a config runs on; read past its own ``__getattribute__``, which costs as much as all the rest."""
    if torch.compiler.is_compiling():  # and can't be passed by there
        return config.__dict__.get(CONFIG_NAME)
    return object.__getattribute__(config, "__dict__").get(CONFIG_NAME)


def _held(name: str, model: str, reasons: list[Reason]) -> RegistrationError:
    free = next((one for one in ("auto", *axattn_functions()) if one != name and not foreign(one)), "sdpa")
    return RegistrationError(
        f"axattn's {name} can't serve {model}",
        reasons,
        f'Use attn_implementation="{free}". {name} is there again once the other registration is gone; the other '
        "package's function runs through Transformers' own from_pretrained.",
    )
