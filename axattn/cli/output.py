"""Output shared by the verbs: JSON on stdout, errors on stderr, colours only on a terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import typer

TRACEBACK = "AXATTN_TRACEBACK"
"""Environment variable that shows the traceback of unexpected errors."""


def print_json(value: Any) -> None:
    """Print JSON on stdout; NaN and infinity become null."""
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def described(error: BaseException) -> dict[str, Any]:
    """An error as data: ``type``, ``message``, and for axattn's errors ``reasons`` and ``advice``."""
    reasons = [{"feature": r.feature, "text": r.text, "fix": r.fix} for r in getattr(error, "reasons", ())]
    text = error.format_message() if hasattr(error, "format_message") else _one_line(error)
    return {"type": type(error).__name__, "message": text, "reasons": reasons, "advice": getattr(error, "advice", "")}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def user_errors(as_json: bool = False) -> Iterator[None]:
    """Turn an error into one line on stderr and exit code 1; with `as_json` also into JSON on stdout,
    ``{"error": {...}}`` (see `described`)."""
    from axattn.errors import AxattnError

    try:
        yield
    except (AxattnError, OSError, ValueError) as error:
        _print_error(
            error, as_json, "" if isinstance(error, AxattnError) or str(error) else f"{type(error).__name__}: "
        )
        raise typer.Exit(1) from None
    except Exception as error:
        if hasattr(error, "exit_code") or os.environ.get(TRACEBACK):  # Typer's usage errors and exits
            raise
        _print_error(error, as_json, f"{type(error).__name__}: ", f" (set {TRACEBACK}=1 for the traceback)")
        raise typer.Exit(1) from None


def _print_error(error: Exception, as_json: bool, prefix: str = "", suffix: str = "") -> None:
    if as_json:
        print_json({"error": described(error)})
    typer.echo(f"axattn: {prefix}{_one_line(error)}{suffix}", err=True)


def quiet_transformers() -> None:
    """Silence messages and progress bars of Transformers and the hub."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
