"""The functions that stand in Transformers' registries: one attention function a name, one mask function for all."""

from __future__ import annotations

import functools
from typing import Any

from axattn.attention.interface import attend
from axattn.documents.forward_context import current
from axattn.hf.registries import attends
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import lazy_mask
from axattn.spec import names


def mask_function(config: Any = None, **keywords: Any) -> LazyMask | None:
    """`lazy_mask`; None, as if no mask function were registered, where another package's attention function gets it.

    A model with an input hook is refused there (`axattn.hf.registries.require_registered`).
    """
    if config is not None and current() is None and not attends(config):
        return None
    return lazy_mask(config=config, **keywords)


FUNCTIONS: dict[str, tuple[functools.partial[Any], Any]] = {
    name: (functools.partial(attend, name), mask_function) for name in names.axattn_backends()
}
"""Name of ours → attention function, mask function."""
