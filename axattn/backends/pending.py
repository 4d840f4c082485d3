"""Kernels whose requirements axattn already knows and checks, and whose adapters this version does not have yet."""

from __future__ import annotations

from axattn.errors import Reason


def no_adapter(name: str) -> Reason:
    """The reason that stands first for a kernel without an adapter in this version: asking for it is refused."""
    return Reason("version", f"this version of axattn has no adapter for {name} yet", "upgrade axattn when it has")
