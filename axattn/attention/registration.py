"""The only module that writes to Transformers' registries: it adds axattn's backends, replaces no name of another
package, and can undo this.

If another package has registered a function under a name, axattn leaves the whole name, attention and mask, to it.
``import axattn`` does not warn of it; loading a model on that name raises (`axattn.hf.registries`, which also checks
every forward). This file is part of ``import axattn``, so it imports only what it needs to wait for Transformers.
With ``AXATTN_AUTO_REGISTER=0`` nothing is registered before `register` or the first load through axattn.
"""

from __future__ import annotations

import os
import threading

from axattn.hf import own_functions
from axattn.hf.post_import import after_import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from axattn.errors import Reason

_WATCHED = ("transformers.modeling_utils", "transformers.masking_utils")
_lock = threading.RLock()
_active = False
_waiting = False


def _functions() -> dict[str, tuple[Any, Any]]:
    from axattn.attention.registry_functions import FUNCTIONS

    return FUNCTIONS


own_functions.load = _functions


def register() -> None:
    """Register axattn's backends now. Imports Transformers. Idempotent.

    Raises:
        RegistrationError: another package holds some of their names; all others are registered.
    """
    held = register_free()
    if held:
        from axattn.errors import RegistrationError

        raise RegistrationError(
            "axattn can't register all of its names with Transformers",
            held,
            "The others are registered. Remove the other registration and call axattn.register() again.",
        )


def register_free() -> list[Reason]:
    """Register axattn's backends whose names are free; return the reasons for the others.

    If another package has taken a name since, axattn removes its half of it.
    """
    from axattn.hf import registries

    return _register_in(dict(zip(registries.INTERFACES, registries.interfaces(), strict=True)))


def _register_in(interfaces: dict[str, Any]) -> list[Reason]:
    """`register_free` in these registries of Transformers, by kind."""
    global _active  # noqa: PLW0603  # one registry per process, as in Transformers
    from axattn.hf import registries

    functions_by_name = registries.axattn_functions()
    held: list[Reason] = []
    with _lock:  # import nothing under this lock: a thread that holds the import lock may wait for it
        _active = True
        for name, functions in functions_by_name.items():
            found = [(kind, registries.registered_function(one, name)) for kind, one in interfaces.items()]
            reasons = registries.foreign(name, found)
            held += reasons
            for kind, function in zip(registries.INTERFACES, functions, strict=True):
                table = interfaces[kind]._global_mapping if kind in interfaces else {}
                if not reasons:
                    table[name] = function
                elif name in table and registries.of_axattn(table[name]):
                    del table[name]
    return held


def unregister() -> None:
    """Remove axattn's backends, and nothing else, from Transformers' registries."""
    global _active, _waiting  # noqa: PLW0603
    _waiting = False
    if not _active:
        return
    from axattn.hf import registries

    functions_by_name = registries.axattn_functions()
    tables = [interface._global_mapping for interface in registries.interfaces()]
    with _lock:
        _active = False
        for name in functions_by_name:
            for table in tables:
                if name in table and registries.of_axattn(table[name]):
                    del table[name]


def registered() -> bool:
    """Whether axattn's backends whose names are free are in Transformers' registries."""
    if not _active:
        return False
    from axattn.hf import registries

    free = [name for name in registries.axattn_functions() if not registries.foreign(name)]
    return bool(free) and all(registries.holds_axattn(name) for name in free)


def register_when_imported() -> None:
    """Register the free names: now if ``transformers.modeling_utils`` is imported, else as soon as it is. Their mask
    functions follow when a model imports ``transformers.masking_utils``, which takes 0.03 s.

    May be called during that import (as an entry point of ``torch.backends``, for example), and raises nothing.
    Does nothing under ``AXATTN_AUTO_REGISTER=0``.
    """
    global _waiting  # noqa: PLW0603
    if _waiting or os.environ.get("AXATTN_AUTO_REGISTER", "").lower() in ("0", "false", "no"):
        return
    _waiting = True
    for module in _WATCHED:
        after_import(module, _register_if_wanted)


def _register_if_wanted() -> None:
    """Register in the registries that are imported, unless `unregister` was called before."""
    global _waiting  # noqa: PLW0603
    from axattn.hf import registries

    registries.axattn_functions()  # imports them, see `_register_in`
    with _lock:
        if not _waiting:
            return
        imported = registries.imported_interfaces()
        _waiting = len(imported) < len(registries.INTERFACES)
        if _waiting:
            _register_in(imported)
        else:
            register_free()
