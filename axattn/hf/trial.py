"""Runs a `Skeleton` on a few tokens: which tokens, what a failure means, which answers are kept. What is asked is in
`axattn.hf.probes`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from axattn.hf.skeleton import Skeleton, signature

_FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError),
    *(RuntimeError, StopIteration, TypeError, ValueError),
)
"""What model code raises on a skeleton that lacks what it wants: a layer (AttributeError, IndexError; NameError where a
loop would have set it), a weight (TypeError, StopIteration), an input (TypeError, ValueError, AssertionError), tensors
that lie on ``meta`` or have shapes that do not fit (RuntimeError), a library (ImportError, OSError)."""
_LENGTH = 6
PADDED = 2
"""How many tokens of a padded row are padding."""

Answer = TypeVar("Answer")

KEPT: dict[Any, Any] = {}
"""Answers, by question and what tells models apart."""
_open: ContextVar[dict[int, Skeleton] | None] = ContextVar("skeletons", default=None)


@contextlib.contextmanager
def shared_skeletons() -> Iterator[None]:
    """While this is open models stay as they are, and one skeleton of each serves for all questions."""
    token = _open.set({}) if _open.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _open.reset(token)


def _skeleton(model: torch.nn.Module) -> Skeleton:
    held = _open.get()
    if held is None:
        return Skeleton(model)
    if id(model) not in held:
        held[id(model)] = Skeleton(model)
    return held[id(model)]


def question(asked: Callable[[Skeleton], Answer | None]) -> Callable[[torch.nn.Module], Answer | None]:
    """A question about a model, put to its skeleton: once for all models that are alike. None where it can't be."""

    @functools.wraps(asked)
    def ask(model: Any) -> Answer | None:
        if getattr(model.config, "is_encoder_decoder", False):  # its two sides are fed in other ways
            return None
        with _alone():
            try:
                skeleton = _skeleton(model)
            except _FAILURES:
                return None
            key = (asked, skeleton.key)
            if key not in KEPT:
                skeleton.forget()
                try:
                    KEPT[key] = asked(skeleton)
                except _FAILURES:
                    KEPT[key] = None
        found: Answer | None = KEPT[key]
        return found

    return ask


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nothing of the caller's goes in (autocast, inference mode, a default device), no random number is used up."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


class Tokens:
    """A batch of three rows of six tokens: whole, padded on the left, padded on the right.

    The second real token of each row has the largest id but for the third, which ends a text: models that look for
    either (CLIP) find it in no fixed place. Where the config names no padding token, it does here.

    Attributes:
        ids: int64 ``[3, 6]``.
        mask: as `ids`.
        few: int64 ``[1, 3]``, tokens of which none is special.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        config, size = skeleton.config, skeleton.vocabulary
        text = config.get_text_config()
        for one in (config, text):
            pad = getattr(one, "pad_token_id", None)
            if not isinstance(pad, int) or not 0 <= pad < size:
                one.pad_token_id = 0
        special = {value for one in (config, text) for name, value in vars(one).items() if _is_id(name, value)}
        few = [one for one in range(3, min(size, 64)) if one not in special][:6]
        end = getattr(text, "eos_token_id", None)
        end = end if isinstance(end, int) and end != text.pad_token_id and 0 <= end < size else few[4]
        real = [few[0], few[5], end, *few[1:4]]
        short, pads = real[: _LENGTH - PADDED], [text.pad_token_id] * PADDED
        self.few = torch.tensor([few[:3]], device="cpu")
        self.ids = torch.tensor([real, pads + short, short + pads], device="cpu")
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :PADDED] = self.mask[2, -PADDED:] = 0


def _is_id(name: str, value: Any) -> bool:
    return isinstance(value, int) and name.endswith(("_token_id", "_token_index"))


def takes(skeleton: Skeleton, name: str) -> bool:
    """Whether the copy's ``forward`` takes a keyword."""
    parameters = signature(type(skeleton.root).forward).parameters
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def run(skeleton: Skeleton, **inputs: Any) -> Any:
    """The output of a forward of the copy."""
    steady = {"use_cache": False, "return_dict": True}
    inputs |= {name: value for name, value in steady.items() if takes(skeleton, name)}
    return skeleton.root(**inputs)
