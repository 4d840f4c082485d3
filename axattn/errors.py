"""Errors that axattn raises, each with its reasons as data. No other logic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason why a kernel can't be used.

    Attributes:
        feature: what is missing: a field of `Need`, or ``library``, ``gpu``, ``version``, ``model``, ...
        text: one readable clause, such as ``softcap=50.0 (sage has no softcap)``.
        fix: the command or the argument that fixes it, or ``""``.
    """

    feature: str
    text: str
    fix: str = ""


class AxattnError(Exception):
    """Base class of axattn's errors.

    Attributes:
        reasons: every reason, not only the first.
        advice: what to type instead, or ``""``.
    """

    def __init__(self, message: str, reasons: Sequence[Reason] = (), advice: str = "") -> None:
        self.reasons: tuple[Reason, ...] = tuple(reasons)
        self.advice = advice
        super().__init__(_compose(message, self.reasons, advice))


class UnknownAttentionError(AxattnError, ValueError):
    """Neither axattn nor Transformers has an attention implementation of this name."""


class BackendUnavailableError(AxattnError, RuntimeError):
    """This machine can't run the kernel: a library, GPU or version is missing."""


class UnsupportedAttentionError(AxattnError, ValueError):
    """The kernel does not compute what the model, the layer or the call needs."""


class InvalidInputError(AxattnError, ValueError):
    """An argument can't be used: a model, folder or batch is missing, or the tensors passed to a model (position ids,
    cu_seqlens, masks) contradict each other."""


class InvalidConfigError(AxattnError, ValueError):
    """A configuration (YAML or keyword) is not a valid attention configuration."""


class RegistrationError(AxattnError, RuntimeError):
    """Transformers' registries hold another package's function, or none, under the name of an axattn backend."""


def _compose(message: str, reasons: Sequence[Reason], advice: str) -> str:
    text = message
    if reasons:
        text += ": " + "; ".join(reason.text for reason in reasons)
    if advice:
        text += ("" if text.endswith((".", "!", "?")) else ".") + " " + advice
    return text
