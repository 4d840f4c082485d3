"""Transformers' one process-wide slot for flash functions: filled before weights load, put back when that fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from axattn import names
from axattn.errors import BackendUnavailableError, Reason
from axattn.hf.model_internals import flash_slot


def preload(running: Iterable[str | None], *, allow_all_kernels: bool = False) -> None:
    """Import the flash and hub kernels among `running`, as Transformers would while it makes the model.

    A failed import leaves Transformers' slot (5.17 to 5.23) named after the kernel that failed, with the functions of
    the one before: the next attempt would run those under the wrong name. Here it is put back.

    Args:
        running: names that Transformers is about to be given.
        allow_all_kernels: hub kernels from any publisher, at any revision.

    Raises:
        BackendUnavailableError: a kernel fails to import; its own error is the cause.
    """
    slot: Any = flash_slot()
    for name in dict.fromkeys(running):
        if name is None or not names.is_flash(name) or name.startswith("paged|"):
            continue
        before = slot._loaded_implementation
        try:
            slot.lazy_import_flash_attention(name, allow_all_kernels=allow_all_kernels)
        except Exception as error:
            slot._loaded_implementation = before
            raise BackendUnavailableError(
                f"{name} fails to load",
                [Reason("library", f"{type(error).__name__}: {error}")],
                'Use attn_implementation="auto", which needs no other library.',
            ) from error
