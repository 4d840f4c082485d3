"""Finds the callers of the running forward in Python's frames, and which outputs they read."""

from __future__ import annotations

import inspect
import sys
from types import CodeType
from typing import Any

from axattn.hf.torch_internals import keywords_of_call
from axattn.hf.weak_cache import weak_cache

_FRAMES = 60


def reads_last_token(*, causal: bool) -> bool:
    """Whether a caller of the running forward reads only the last token of each row: it passes ``logits_to_keep=1``, or
    is Transformers' ``generate``. Don't call it while a graph is traced, which has no callers.

    Args:
        causal: whether the attention is causal; else it may be an encoder's, which ``generate`` reads through the
            decoder.
    """
    generate = _generate()
    frame = inspect.currentframe()
    for _ in range(_FRAMES):
        if frame is None:
            break
        keywords = keywords_of_call(frame)
        keep = None if keywords is None else keywords.get("logits_to_keep")
        if type(keep) is int and keep == 1:
            return True
        if frame.f_code is generate:
            return causal or not frame.f_locals["self"].config.is_encoder_decoder
        frame = frame.f_back
    return False


def generates() -> bool:
    """Whether Transformers' ``generate`` called the running forward."""
    generate, frame = _generate(), inspect.currentframe()
    for _ in range(_FRAMES):
        if frame is None or generate is None:
            return False
        if frame.f_code is generate:
            return True
        frame = frame.f_back
    return False


def _generate() -> CodeType | None:
    """The code of ``generate``; None before its module is imported."""
    module = sys.modules.get("transformers.generation.utils")
    return None if module is None else _code_of(module.GenerationMixin.generate)


@weak_cache
def _code_of(function: Any) -> CodeType:
    code: CodeType = inspect.unwrap(function).__code__
    return code
