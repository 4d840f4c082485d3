"""`Option`: a setting of a kernel (``kernel_options={"group_size": 512}``), and its checks. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from axattn.errors import InvalidConfigError, Reason


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a kernel.

    Attributes:
        name: key in ``kernel_options``.
        default: value when it is not given.
        meaning: one line for the docs, without a full stop.
        wrong: returns why a value is invalid, ``""`` when it is valid.
        backends: the backend that serves the call, by value of the option, in the order of ``"auto"``.
    """

    name: str
    default: Any
    meaning: str
    wrong: Callable[[Any], str]
    backends: Mapping[str, str] = field(default_factory=dict, hash=False)


def one_of(*values: Any) -> Callable[[Any], str]:
    """A check for `Option.wrong` that accepts these values."""
    shown = ", ".join(repr(value) for value in values)
    kinds = tuple({type(value) for value in values})
    return lambda given: "" if isinstance(given, kinds) and given in values else f"is not one of {shown}"


def require_options(given: Mapping[str, Any], offered: Mapping[str, Sequence[Option]]) -> None:
    """Raise unless every option belongs to a kernel and every value is valid.

    Args:
        given: ``kernel_options`` as the user wrote it.
        offered: the options of each named kernel.

    Raises:
        InvalidConfigError: lists every reason and the options that the kernels have.
    """
    reasons: list[Reason] = []
    require_mapping(given)
    for name, value in given.items():
        found = [option for options in offered.values() for option in options if option.name == name]
        if not found:
            reasons.append(Reason("options", f"{', '.join(offered)} has no option {name!r}"))
        reasons += [Reason("options", f"{name}={value!r} {why}") for option in found if (why := option.wrong(value))]
    if reasons:
        lines = [f"{kernel}: {option.name} ({option.meaning})" for kernel, o in offered.items() for option in o]
        advice = f"Options: {'; '.join(lines)}." if lines else "These kernels have no options."
        raise InvalidConfigError("kernel_options can't be used", reasons, advice)


def require_mapping(given: Any) -> None:
    """Raise unless ``kernel_options`` is a dict or None.

    Raises:
        InvalidConfigError: it is not.
    """
    if given is not None and not isinstance(given, Mapping):
        advice = 'For example {"group_size": 512}; docs/attention.md lists the options.'
        raise InvalidConfigError(f"kernel_options must be a dict, not {type(given).__name__}", advice=advice)
