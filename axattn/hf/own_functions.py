"""Where axattn's own attention and mask functions come from, so that nothing in `axattn.hf` imports them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

load: Callable[[], dict[str, tuple[Any, Any]]]
"""Name → attention function, mask function; set by `axattn.attention.registration`, which ``import axattn`` imports."""
