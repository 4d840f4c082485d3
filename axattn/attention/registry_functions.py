"""The functions in Transformers' registries: an attention function per axattn backend, one mask function for all."""

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
    """`lazy_mask`; None, as without a registered mask function, if another package's attention function runs.

    A model with an input hook is refused in that case (`axattn.hf.registries.require_registered`).
    """
    if config is not None and current() is None and not attends(config):
        return None
    return lazy_mask(config=config, **keywords)


FUNCTIONS: dict[str, tuple[functools.partial[Any], Any]] = {
    name: (functools.partial(attend, name), mask_function) for name in names.axattn_backends()
}
"""axattn backend → attention function, mask function."""
