"""Patch: room for the kernels that flex_attention compiles, and a word when it runs out.

Transformers compiles ``flex_attention`` once a process; torch makes a kernel for each kind of call (shapes, masks, with
and without gradient) and, after 8 of them, runs further kinds uncompiled: dense S x S scores, with a warning that names
neither Transformers nor a way out.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from axattn.patches.patchset import PatchSet

LIMIT = 64
"""Kernels that one process may compile; torch's own default is 8."""

logger = logging.getLogger("axattn")
_DYNAMO = logging.getLogger("torch._dynamo.convert_frame")


class _Open(threading.local):
    def __init__(self) -> None:
        self.patches: list[tuple[CompileRoom, Any]] = []


_open = _Open()


class CompileRoom:
    """Forward pre-hook and forward hook of a model on flex_attention: torch's settings for the length of the forward.

    On a CPU every shape gets a kernel of its own: torch 2.13 writes C++ that does not compile for shapes that vary.
    """

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
    patches.add_handle(model.register_forward_pre_hook(room.enter, prepend=True))
    patches.add_handle(model.register_forward_hook(room.leave, always_call=True))
    if _say_when_it_runs_out not in _DYNAMO.filters:
        _DYNAMO.addFilter(_say_when_it_runs_out)


def _say_when_it_runs_out(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if "recompile_limit" in text and "'flex_attention'" in text:
        logger.warning(
            "axattn: flex_attention runs uncompiled from here on for calls of a new kind (slow, and S x S in memory): "
            "torch has compiled as many kernels as it may. Give the rows fewer lengths "
            "(PackingCollator(max_length, pad_rows=True)), raise torch._dynamo.config.recompile_limit above %d, "
            'or use attn_implementation="auto".',
            LIMIT,
        )
    return True
