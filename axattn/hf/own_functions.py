"""Access to axattn's attention and mask functions without importing them in `axattn.hf`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

load: Callable[[], dict[str, tuple[Any, Any]]]
"""Name → attention function, mask function; set by `axattn.attention.registration`, which ``import axattn`` imports."""
