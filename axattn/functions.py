"""The functions that stand in Transformers' registries: one attention function a name, one mask function for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from axattn import names
from axattn.interface import attend
from axattn.masking import lazy_mask

mask_function = lazy_mask


@functools.cache
def attention_functions() -> dict[str, Callable[..., Any]]:
    """Name of ours → attention function. The same objects on every call."""
    return {name: functools.partial(attend, name) for name in names.ours()}
