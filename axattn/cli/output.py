"""What the verbs share: JSON on stdout, errors on stderr, colours only on a terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import typer


def print_json(value: Any) -> None:
    """JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error of ours, or a model that can't be found, into one line on stderr and exit code 1."""
    from axattn.errors import AxattnError

    try:
        yield
    except AxattnError as error:
        typer.echo(f"axattn: {error}", err=True)
        raise typer.Exit(1) from None
    except (OSError, ValueError) as error:
        typer.echo(f"axattn: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(1) from None


def quiet_transformers() -> None:
    """Keep Transformers' and the hub's notices out of a verb's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
