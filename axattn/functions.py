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
    return {name: _attention_function(name) for name in names.OURS}


def _attention_function(name: str) -> Callable[..., Any]:
    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return attend(name, module, query, key, value, attention_mask, **kwargs)

    attention.__name__ = attention.__qualname__ = f"{name}_attention"
    attention.__doc__ = f"Transformers' attention interface for {name!r}; see `axattn.interface.attend`."
    return attention
