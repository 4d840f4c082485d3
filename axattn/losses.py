"""How a model computes its loss: whether it predicts the next token, and whether it takes targets already shifted."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch

IGNORE_INDEX = -100


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """``[B, S]``: what each token predicts in its own row; the last one of a row predicts nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def predicts_next(model: Any) -> bool:
    """Whether a model's loss is that of the next token."""
    return "CausalLM" in str(getattr(model, "loss_type", None)) or type(model).__name__.endswith("ForCausalLM")


@functools.cache
def takes_keywords(cls: Any) -> bool:
    """Whether a model hands its keywords (``shift_labels``, ``num_items_in_batch``) to ``self.loss_function``.

    Read in the source of its forward; unreadable source counts as no.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    losses = [call for call in calls if ast.unparse(call.func) == "self.loss_function"]
    return bool(losses) and all(any(keyword.arg is None for keyword in call.keywords) for call in losses)
