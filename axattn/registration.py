"""The only place that touches Transformers' registries: adds our names, replaces no foreign one, undoes exactly.

``import axattn`` imports this file, so it imports nothing itself that is not needed to wait for Transformers.
"""

from __future__ import annotations

import threading
from typing import Any

from axattn.hf.post_import import after_import, is_imported

_WATCHED = "transformers.modeling_utils"
_lock = threading.RLock()
_active = False
_hooked = False


def register() -> None:
    """Register our names now. Imports Transformers. Idempotent.

    Raises:
        RegistrationError: another package holds one of our names; nothing is registered then.
    """
    global _active  # noqa: PLW0603  # one registry a process, as Transformers has it
    from axattn import names
    from axattn.errors import Reason, RegistrationError
    from axattn.functions import attention_functions, mask_function

    with _lock:
        functions = attention_functions()
        tables = _tables()
        reasons = [
            Reason("name", f"{kind} {name!r} is held by {_describe(table[name])}")
            for kind, table, ours in tables
            for name in names.ours()
            if name in table and table[name] is not (functions[name] if ours else mask_function)
        ]
        if reasons:
            raise RegistrationError(
                "axattn can't register its names with Transformers",
                reasons,
                "Remove the other registration, or import axattn first.",
            )
        for _, table, ours in tables:
            for name in names.ours():
                table[name] = functions[name] if ours else mask_function
        _active = True


def unregister() -> None:
    """Take our names out of Transformers' registries, and only ours; what was there before is there again."""
    global _active  # noqa: PLW0603
    with _lock:
        if _active:
            from axattn import names
            from axattn.functions import attention_functions, mask_function

            functions = attention_functions()
            for _, table, ours in _tables():
                for name in names.ours():
                    if table.get(name) is (functions[name] if ours else mask_function):
                        del table[name]
        _active = False


def registered() -> bool:
    """Whether our names are in Transformers' registries."""
    return _active


def register_when_imported() -> None:
    """Register as soon as ``transformers.modeling_utils`` is there: at once if it is, else after its import."""
    global _hooked  # noqa: PLW0603
    if is_imported(_WATCHED):
        register()
    elif not _hooked:
        _hooked = True
        after_import(_WATCHED, register)


def _tables() -> list[tuple[str, dict[str, Any], bool]]:
    """The class-wide mappings behind ``AttentionInterface.register`` (which has no counterpart that removes)."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return [
        ("attention", AttentionInterface._global_mapping, True),
        ("mask", AttentionMaskInterface._global_mapping, False),
    ]


def _describe(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
