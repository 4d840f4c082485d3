"""Patch: room for the kernels that flex_attention compiles, and a word when it runs out.

Transformers compiles ``flex_attention`` once a process; torch makes a kernel for each kind of call (shapes, masks, with
and without gradient) and, after 8 of them, runs further kinds uncompiled: dense S x S scores, with a warning that names
neither Transformers nor a way out.
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
_RAN_OUT = ("recompile_limit", "'flex_attention'")
"""Both stand in torch's warning that it compiles no further kernel (2.13). It is no interface: where torch words it
otherwise, nothing is said of ours (tests/backends/test_flex.py sees that)."""


class _Open(threading.local):
    def __init__(self) -> None:
        self.patches: list[tuple[CompileRoom, Any]] = []


_open = _Open()


_lock = threading.RLock()
_rooms: set[object] = set()  # a token of each room that is open


class CompileRoom:
    """Forward pre-hook and forward hook of a model on flex_attention: torch's settings for the length of the forward.

    On a CPU every shape gets a kernel of its own: torch 2.13 writes C++ that does not compile for shapes that vary.
    As long as there is an open room, torch's warning is explained.
    """

    def __init__(self) -> None:
        token = object()
        with _lock:
            _rooms.add(token)
            _DYNAMO.addFilter(_say_when_it_runs_out)
        self.close = weakref.finalize(self, _closed, token)
        self.close.atexit = False

    def __reduce__(self) -> Any:
        return CompileRoom, ()  # the model's copy has a room of its own

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
        """After the forward, also when it raised."""
        if _open.patches and _open.patches[-1][0] is self:
            _open.patches.pop()[1].__exit__(None, None, None)


def add_compile_room(patches: PatchSet, model: torch.nn.Module) -> None:
    """Give a model that runs on flex_attention its `CompileRoom`."""
    room = CompileRoom()
    patches.add_undo(_close, room)
    patches.add_handle(model.register_forward_pre_hook(room.enter, prepend=True))
    patches.add_handle(model.register_forward_hook(room.leave, always_call=True))


def _close(room: CompileRoom) -> None:
    room.close()


def _closed(token: object) -> None:
    """A model was restored, or is gone."""
    with _lock:
        _rooms.discard(token)
        if not _rooms:
            _DYNAMO.removeFilter(_say_when_it_runs_out)


def _say_when_it_runs_out(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if all(part in text for part in _RAN_OUT):
        logger.warning(
            "axattn: flex_attention runs uncompiled from here on for calls of a new kind (slow, and S x S in memory): "
            "torch has compiled as many kernels as it may. Give the rows fewer lengths "
            "(PackingCollator(max_length, pad_rows=True)), raise torch._dynamo.config.recompile_limit above %d, "
            'or use attn_implementation="auto".',
            LIMIT,
        )
    return True
