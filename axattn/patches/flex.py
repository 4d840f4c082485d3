"""Patch: a higher recompile limit for flex_attention, and a warning when it is reached.

Transformers compiles ``flex_attention`` once per process; torch makes a kernel for each kind of call (shapes, masks,
with and without gradient). After 8 kernels further kinds run uncompiled, with dense S x S scores, and torch's warning
names neither Transformers nor a fix.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

import torch

from axattn.patches.patchset import PatchSet

LIMIT = 64
"""Kernels that one process may compile; torch's own default is 8."""

logger = logging.getLogger("axattn")
_DYNAMO = logging.getLogger("torch._dynamo.convert_frame")
_LIMIT_WARNING = ("recompile_limit", "'flex_attention'")
"""Both are in torch's warning that it compiles no further kernel (2.13). If torch rewords it, axattn's warning is not
shown (tests/backends/test_flex.py checks that)."""


class _Open(threading.local):
    def __init__(self) -> None:
        self.patches: list[tuple[RecompileLimit, Any]] = []


_open = _Open()


_lock = threading.RLock()
_tokens: set[object] = set()  # one for each `RecompileLimit` in use


class RecompileLimit:
    """Forward pre-hook and forward hook of a model on flex_attention: Dynamo's settings during the forward.

    On a CPU every shape gets its own kernel: for dynamic shapes torch 2.13 generates C++ that does not compile.
    While any is in use, axattn adds its own warning to torch's.
    """

    def __init__(self) -> None:
        token = object()
        with _lock:
            _tokens.add(token)
            _DYNAMO.addFilter(_say_when_it_runs_out)
        self.close = weakref.finalize(self, _closed, token)
        self.close.atexit = False

    def __reduce__(self) -> Any:
        return RecompileLimit, ()  # a copy of the model has its own

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        """Before the forward."""
        if torch.compiler.is_compiling():
            return
        from torch._dynamo import config

        settings: dict[str, Any] = {"recompile_limit": max(LIMIT, config.recompile_limit)}
        if next(module.parameters()).device.type == "cpu":
            settings["automatic_dynamic_shapes"] = False
        patch = config.patch(settings)
        patch.__enter__()
        _open.patches.append((self, patch))

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """After the forward, also if it raised."""
        if _open.patches and _open.patches[-1][0] is self:
            _open.patches.pop()[1].__exit__(None, None, None)


def add_recompile_limit(patches: PatchSet, model: torch.nn.Module) -> None:
    """Put a `RecompileLimit` on a model that runs on flex_attention."""
    limit = RecompileLimit()
    patches.add_undo(_close, limit)
    patches.add_handle(model.register_forward_pre_hook(limit.enter, prepend=True))
    patches.add_handle(model.register_forward_hook(limit.leave, always_call=True))


def _close(limit: RecompileLimit) -> None:
    limit.close()


def _closed(token: object) -> None:
    """A model was restored or deleted."""
    with _lock:
        _tokens.discard(token)
        if not _tokens:
            _DYNAMO.removeFilter(_say_when_it_runs_out)


def _say_when_it_runs_out(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if all(part in text for part in _LIMIT_WARNING):
        logger.warning(
            "axattn: flex_attention runs uncompiled from here on for calls of a new kind (slow, and S x S in memory): "
            "torch has compiled its maximum number of kernels. Use fewer row lengths "
            "(PackingCollator(max_length, pad_rows=True)), raise torch._dynamo.config.recompile_limit above %d, "
            'or use attn_implementation="auto".',
            LIMIT,
        )
    return True
