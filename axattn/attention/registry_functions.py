"""The functions in Transformers' registries: an attention function per axattn backend, one mask function for all.

They import the rest of axattn in their first call. Every process that imports Transformers registers them, and most
never call them: their imports take 0.1 s. They are not replaced afterwards, so that a registered name keeps its object;
`torch.compile` traces through them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from axattn.hf.registries import attends
from axattn.spec import names

if TYPE_CHECKING:
    from axattn.masks.lazy_mask import LazyMask


def attend(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LazyMask | torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`axattn.attention.interface.attend`, and from the second call on the registered functions call that one."""
    from axattn.attention import interface

    if not torch.compiler.is_compiling():
        for function, _ in FUNCTIONS.values():  # the registered objects stay the same
            function.__setstate__((interface.attend, function.args, {}, None))  # type: ignore[attr-defined]  # not in typeshed
    return interface.attend(name, module, query, key, value, attention_mask, **kwargs)


def mask_function(config: Any = None, **keywords: Any) -> LazyMask | None:
    """`axattn.masks.mask_interface.lazy_mask`; None, as without a registered mask function, if another package's
    attention function runs.

    A model with an input hook is refused in that case (`axattn.hf.registries.require_registered`).
    """
    # a graph that read `_imported` would be compiled again once it is set
    if torch.compiler.is_compiling() or not _imported:
        from axattn.documents import forward_context
        from axattn.masks import mask_interface

        if not torch.compiler.is_compiling():
            _imported[:] = forward_context, mask_interface
    else:  # an import statement takes a microsecond each time
        forward_context, mask_interface = _imported
    if config is not None and forward_context.slot().context is None and not attends(config):
        return None
    return mask_interface.lazy_mask(config=config, **keywords)


_imported: list[Any] = []


FUNCTIONS: dict[str, tuple[functools.partial[Any], Any]] = {
    name: (functools.partial(attend, name), mask_function) for name in names.axattn_backends()
}
"""axattn backend → attention function, mask function."""
