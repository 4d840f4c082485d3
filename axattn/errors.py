"""Errors that axattn raises, each with its reasons as data. No logic lives here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a kernel can't be used, as data.

    Attributes:
        feature: what is missing: a field of `Need`, or ``library``, ``gpu``, ``version``, ``model``, ...
        text: one clause for people, such as ``softcap=50.0 (sage has no softcap)``.
        fix: the command or the argument that fixes it, or ``""``.
    """

    feature: str
    text: str
    fix: str = ""


class AxattnError(Exception):
    """Base of every error of ours.

    Attributes:
        reasons: every reason found, not only the first.
        advice: what to type instead, or ``""``.
    """

    def __init__(self, message: str, reasons: Sequence[Reason] = (), advice: str = "") -> None:
        self.reasons: tuple[Reason, ...] = tuple(reasons)
        self.advice = advice
        super().__init__(_compose(message, self.reasons, advice))


class UnknownAttentionError(AxattnError, ValueError):
    """The name given is no attention implementation that axattn or Transformers knows."""


class BackendUnavailableError(AxattnError, RuntimeError):
    """The name is known, but this machine can't run it (library, GPU or version missing)."""


class UnsupportedAttentionError(AxattnError, ValueError):
    """The kernel would not compute what the model, the layer or the call asks for."""


class InvalidInputError(AxattnError, ValueError):
    """What a call is given can't be used: no model, folder or batch is where one is wanted, or the tensors handed to a
    model (positions, cumulative lengths, masks) contradict each other."""


class InvalidConfigError(AxattnError, ValueError):
    """A configuration (YAML or keyword) that can't be read as an attention configuration."""


class RegistrationError(AxattnError, RuntimeError):
    """Transformers' registries hold another package's function, or none, under a name of axattn's that is asked for."""


def _compose(message: str, reasons: Sequence[Reason], advice: str) -> str:
    text = message
    if reasons:
        text += ": " + "; ".join(reason.text for reason in reasons)
    if advice:
        text += ("" if text.endswith((".", "!", "?")) else ".") + " " + advice
    return text
