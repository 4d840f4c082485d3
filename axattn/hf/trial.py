"""Runs a `Skeleton` on a few tokens: the tokens, the meaning of a failure, and the cached answers. The questions are in
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
"""What model code raises if a skeleton lacks a layer (AttributeError, IndexError; NameError if a loop would have set
it), a weight (TypeError, StopIteration), an input (TypeError, ValueError, AssertionError) or a library (ImportError,
OSError), or if tensors are on ``meta`` or their shapes don't fit (RuntimeError)."""
_LENGTH = 6
PADDED = 2
"""Number of padding tokens in a padded row."""

Answer = TypeVar("Answer")

KEPT: dict[Any, Any] = {}
"""Answers, by question and `Skeleton.key`."""
_shared: ContextVar[dict[int, Skeleton] | None] = ContextVar("skeletons", default=None)


@contextlib.contextmanager
def shared_skeletons() -> Iterator[None]:
    """A context in which models don't change, so that one skeleton per model serves all questions."""
    token = _shared.set({}) if _shared.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _shared.reset(token)


def _skeleton(model: torch.nn.Module) -> Skeleton:
    held = _shared.get()
    if held is None:
        return Skeleton(model)
    if id(model) not in held:
        held[id(model)] = Skeleton(model)
    return held[id(model)]


def question(probe: Callable[[Skeleton], Answer | None]) -> Callable[[torch.nn.Module], Answer | None]:
    """Decorator: a probe of a skeleton becomes a function of a model, run once for all models with the same key. It
    returns None if the probe can't run."""

    @functools.wraps(probe)
    def ask(model: Any) -> Answer | None:
        if getattr(model.config, "is_encoder_decoder", False):  # its encoder and decoder take different inputs
            return None
        with _isolated():
            try:
                skeleton = _skeleton(model)
            except _FAILURES:
                return None
            key = (probe, skeleton.key)
            if key not in KEPT:
                skeleton.forget()
                try:
                    KEPT[key] = probe(skeleton)
                except _FAILURES:
                    KEPT[key] = None
        found: Answer | None = KEPT[key]
        return found

    return ask


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """A context isolated from the caller's autocast, inference mode, default device and random state."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


class Tokens:
    """A batch of three rows of six tokens: full, left-padded, right-padded.

    In each row the third real token is EOS and the second has the largest other id, so that models which search for
    either (CLIP) find it at no fixed position. A config without a padding token gets one.

    Attributes:
        ids: int64 ``[3, 6]``.
        mask: shaped as `ids`.
        few: int64 ``[1, 3]``, without special tokens.
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
    """Whether the skeleton's ``forward`` accepts a keyword."""
    parameters = signature(type(skeleton.root).forward).parameters
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def run(skeleton: Skeleton, **inputs: Any) -> Any:
    """The output of a forward of the skeleton."""
    settings = {"use_cache": False, "return_dict": True}
    inputs |= {name: value for name, value in settings.items() if takes(skeleton, name)}
    return skeleton.root(**inputs)
