"""The only place that writes to Transformers' registries: adds our names, replaces no foreign one, undoes exactly.

A name under which another package has put a function is that package's as a whole, attention and mask. Importing axattn
says nothing about it; loading a model on that name raises (`axattn.hf.registries`, which also looks at every forward).

``import axattn`` imports this file, so it imports nothing itself that is not needed to wait for Transformers.
``AXATTN_AUTO_REGISTER=0`` in the environment: nothing is registered before `register` or the first load through axattn.
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

_WATCHED = "transformers.modeling_utils"
_lock = threading.RLock()
_active = False
_waiting = False


def _functions() -> dict[str, tuple[Any, Any]]:
    from axattn.attention.registry_functions import FUNCTIONS

    return FUNCTIONS


own_functions.load = _functions


def register() -> None:
    """Register our names now. Imports Transformers. Idempotent.

    Raises:
        RegistrationError: another package holds some of our names; all others are registered.
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
    """Register those of our names that no other package holds, and return who holds the others.

    A name that another package has taken since is given up, so that no half of it is ours.
    """
    global _active  # noqa: PLW0603  # one registry a process, as Transformers has it
    from axattn.hf import registries

    ours = registries.axattn_functions()
    tables = [interface._global_mapping for interface in registries.interfaces()]
    held: list[Reason] = []
    with _lock:  # nothing is imported under it: another thread may hold that import, and wait for this lock in it
        _active = True
        for name, functions in ours.items():
            reasons = registries.foreign(name)
            held += reasons
            for table, function in zip(tables, functions, strict=True):
                if not reasons:
                    table[name] = function
                elif name in table and registries.of_axattn(table[name]):
                    del table[name]
    return held


def unregister() -> None:
    """Take our names out of Transformers' registries, and only ours; what was there before is there again."""
    global _active, _waiting  # noqa: PLW0603
    _waiting = False
    if not _active:
        return
    from axattn.hf import registries

    ours = registries.axattn_functions()
    tables = [interface._global_mapping for interface in registries.interfaces()]
    with _lock:
        _active = False
        for name in ours:
            for table in tables:
                if name in table and registries.of_axattn(table[name]):
                    del table[name]


def registered() -> bool:
    """Whether those of our names that no other package holds are in Transformers' registries."""
    if not _active:
        return False
    from axattn.hf import registries

    free = [name for name in registries.axattn_functions() if not registries.foreign(name)]
    return bool(free) and all(registries.holds_axattn(name) for name in free)


def register_when_imported() -> None:
    """Register what is free: at once if ``transformers.modeling_utils`` is imported, else as soon as it is.

    It may be called in the middle of that import (as an entry point of ``torch.backends``, say), and raises nothing.
    Does nothing under ``AXATTN_AUTO_REGISTER=0``.
    """
    global _waiting  # noqa: PLW0603
    if _waiting or os.environ.get("AXATTN_AUTO_REGISTER", "").lower() in ("0", "false", "no"):
        return
    _waiting = True
    after_import(_WATCHED, _register_if_wanted)


def _register_if_wanted() -> None:
    """Unless `unregister` was called before Transformers came."""
    global _waiting  # noqa: PLW0603
    if _waiting:
        _waiting = False
        register_free()
