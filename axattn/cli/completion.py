"""Values that the shell completes. Imports no torch, so that the Tab key answers at once."""

from __future__ import annotations


def attention_names(incomplete: str) -> list[str]:
    """Names of attention implementations."""
    from axattn.backends import builtin_names

    return [name for name in ("auto", *builtin_names()) if name.startswith(incomplete)]


def machines(incomplete: str) -> list[str]:
    """Machines that can be planned for."""
    from axattn.machine.presets import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]
