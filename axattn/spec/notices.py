"""`warn_once`: warnings that are logged once per process, through the logger ``axattn``."""

from __future__ import annotations

import logging
from collections.abc import Hashable

logger = logging.getLogger("axattn")

_given: set[Hashable] = set()


def warn_once(text: str, key: Hashable = None) -> None:
    """Log a warning the first time.

    Args:
        text: the message, without axattn's name.
        key: warnings with the same key are logged once; None for the text.
    """
    if (key or text) not in _given:
        _given.add(key or text)
        logger.warning("axattn: %s", text)
