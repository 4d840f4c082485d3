"""Reads Transformers' registries of attention and mask functions, in the same way as its models.

`axattn.attention.registration` writes to them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch

from axattn.errors import Reason, RegistrationError
from axattn.hf import own_functions
from axattn.hf.model_internals import CONFIG_NAME, attribute_of
from axattn.hf.post_import import is_imported
from axattn.hf.source_inspection import origin
from axattn.hf.watched import Entry

INTERFACES = {
    "attention": ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    "mask": ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
}
"""Kind → module and name of the instance that models use."""
_interfaces: list[Any] = []  # no functools.cache: torch.compile would trace the cached function
_axattn_functions: dict[str, tuple[Any, Any]] = {}  # by name: attention function, mask function


def interfaces() -> list[Any]:
    """The ``AttentionInterface`` and ``AttentionMaskInterface`` instances of models. Imports Transformers."""
    if not _interfaces:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        _interfaces[:] = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return _interfaces


def imported_interfaces() -> dict[str, Any]:
    """Those of `interfaces` whose module is imported, by kind. Imports nothing."""
    return {
        kind: getattr(sys.modules[module], name) for kind, (module, name) in INTERFACES.items() if is_imported(module)
    }


def axattn_functions() -> dict[str, tuple[Any, Any]]:
    """axattn's attention function and mask function, by name. The same objects on every call."""
    if not _axattn_functions:
        _axattn_functions.update(own_functions.load())
    return _axattn_functions


def registered_function(interface: Any, name: str) -> Any:
    """The function that Transformers uses for a name: the instance's (``interface[name] = f``), else the global one.

    None if there is none.
    """
    local = interface._local_mapping
    return local[name] if name in local else interface._global_mapping.get(name)


def holds_axattn(name: str) -> bool:
    """Whether both functions under a name are axattn's."""
    attention, masks = _interfaces or interfaces()
    function, mask = _axattn_functions[name] if _axattn_functions else axattn_functions()[name]
    if name in attention._local_mapping or name in masks._local_mapping or torch.compiler.is_compiling():
        return _is(registered_function(attention, name), function) and registered_function(masks, name) is mask
    # before every forward: `registered_function` without its calls
    found: bool = attention._global_mapping.get(name) is function and masks._global_mapping.get(name) is mask
    return found


def _is(found: Any, function: functools.partial[Any]) -> bool:
    """Whether a registered attention function is this function of axattn's."""
    if not torch.compiler.is_compiling():
        return found is function
    # torch.compile can't compare the identity of partials, only their parts. These reads guard the graph: it is
    # recompiled, and refused, after another package registers the name.
    return getattr(found, "func", None) is function.func and found.args == function.args and not found.keywords


def foreign(name: str, found: Iterable[tuple[str, Any]] = ()) -> list[Reason]:
    """The functions under an axattn backend's name that belong to another package; empty if there are none.

    Args:
        name: the name.
        found: kind and function; those in Transformers' shared instances if empty.
    """
    looked_up = tuple(found) or [
        (kind, registered_function(interface, name)) for kind, interface in zip(INTERFACES, interfaces(), strict=True)
    ]
    return [
        Reason("name", f"{kind} {name!r} is held by {described(function)}")
        for kind, function in looked_up
        if function is not None and not of_axattn(function)
    ]


def of_axattn(function: Any) -> bool:
    """Whether a function is axattn's, of this import or of an earlier one that is no longer in ``sys.modules``."""
    if isinstance(function, functools.partial) and (len(function.args) != 1 or function.keywords):
        return False  # another package's partial of an axattn function
    module = getattr(getattr(function, "func", function), "__module__", None) or ""
    return module.partition(".")[0] == "axattn"


def described(function: Any) -> str:
    """Module and qualified name of a function, of the function in a ``functools.partial``, or of an object's class."""
    if isinstance(function, functools.partial):
        return f"functools.partial({described(function.func)})"
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or '?'}.{name}"


def require_free(names: Iterable[str], model: str) -> None:
    """Raise if another package has registered the name of one of these axattn backends.

    Raises:
        RegistrationError: names the function and an alternative.
    """
    for name in names:
        reasons = foreign(name) if name in axattn_functions() else []
        if reasons:
            raise _taken(name, model, reasons)


def require_own_file(name: str, layer: str, cls: Any) -> None:
    """Raise if the file of an attention module has a separate registry with another package's function.

    Args:
        name: an axattn backend.
        layer: for the message.
        cls: the module's class.

    Raises:
        RegistrationError: as `require_free`.
    """
    forward = inspect.unwrap(origin(cls).forward)
    interface = getattr(forward, "__globals__", {}).get("ALL_ATTENTION_FUNCTIONS")
    if interface is not interfaces()[0] and hasattr(interface, "_local_mapping"):
        reasons = foreign(name, [(f"in {forward.__module__}, attention", registered_function(interface, name))])
        if reasons:
            raise _taken(name, layer, reasons)


def entries_of(name: Any) -> list[Entry]:
    """The entries of the registries that `require_registered` reads for a name."""
    return [(table, name) for one in interfaces() for table in (one._local_mapping, one._global_mapping)]


def require_registered(module: Any) -> None:
    """Raise if a model whose forward starts runs on an axattn backend that is no longer registered.

    Raises:
        RegistrationError: another package has registered the name since, or it was removed.
    """
    name = name_of(module.config)
    if name in (_axattn_functions or axattn_functions()) and not holds_axattn(name):
        model = type(module).__name__
        reasons = foreign(name)
        if reasons:
            raise _taken(name, model, reasons)
        text = f"Transformers' registries no longer hold the {name!r} that this import of axattn registered"
        raise RegistrationError(
            f"{name} can't serve {model}", [Reason("name", text)], "Call axattn.register(), or axattn.restore(model)."
        )


def attends(config: Any) -> bool:
    """Whether the mask made for a config goes to an attention function of Transformers or axattn."""
    name = name_of(config)
    return name not in axattn_functions() or _is(
        registered_function(interfaces()[0], name), axattn_functions()[name][0]
    )


def require_mask(name: str, layer: str) -> None:
    """Raise if another package has replaced axattn's mask function but not its attention function.

    Raises:
        RegistrationError: as `require_free`.
    """
    if name in axattn_functions() and registered_function(interfaces()[1], name) is not axattn_functions()[name][1]:
        reasons = foreign(name)
        if reasons:
            raise _taken(name, layer, reasons)


def name_of(config: Any) -> Any:
    """The name in a config."""
    return attribute_of(config, CONFIG_NAME)


def _taken(name: str, model: str, reasons: list[Reason]) -> RegistrationError:
    free = next((one for one in ("auto", *axattn_functions()) if one != name and not foreign(one)), "sdpa")
    return RegistrationError(
        f"axattn's {name} can't serve {model}",
        reasons,
        f'Use attn_implementation="{free}". {name} is available again once the other registration is removed; the '
        "other package's function runs through Transformers' own from_pretrained.",
    )
