"""Where a model mixes tokens other than in attention, or numbers them itself: read from its config and its modules.

Such layers know nothing of documents: packed rows leak through them, and rows can't be cut or put together.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from typing import Any

import torch

from axattn.errors import Reason

ATTENTION = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "moe", "sparse"}
)
"""Transformers' layer types that mix tokens in attention alone (the last three say what follows it)."""


def mixers(model: torch.nn.Module) -> list[Reason]:
    """Layers of a text model that mix tokens elsewhere than in attention: state spaces, convolutions, linear attention.

    Args:
        model: a ``PreTrainedModel``; of a composite one its text model is read.
    """
    text = _text_model(model)
    config: Any = text.config
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()) - ATTENTION
    kinds = {k for k in map(str, kinds) if "attention" not in k or "linear" in k or "compressed" in k}
    reasons = []
    if kinds:
        reasons.append(
            Reason("model", f"its layers of type {', '.join(sorted(kinds))} mix tokens outside of attention")
        )
    convolutions = [name for name, module in text.named_modules() if isinstance(module, torch.nn.Conv1d)]
    if convolutions and not kinds:
        reasons.append(Reason("model", f"{convolutions[0]} (a convolution) mixes neighbouring tokens"))
    return reasons


def counters(model: torch.nn.Module) -> list[Reason]:
    """Layers that number the tokens they see themselves, whatever ``position_ids`` say (Llama 4's without RoPE)."""
    kinds: dict[str, Any] = {name: type(module) for name, module in model.named_modules() if _uses_count(module)}
    counting = [name for name, cls in kinds.items() if _counts_tokens(cls)]
    return [Reason("model", f"{name} counts positions among the tokens that it sees") for name in counting[:1]]


@functools.cache
def counts_mask(cls: Any) -> bool:
    """Whether a model's file computes positions from the attention mask where none are given (OPT)."""
    source = inspect.getsource(sys.modules[cls.__module__])
    return "cumsum(attention_mask" in source or "attention_mask.cumsum" in source


def one_a_row(model: torch.nn.Module) -> list[Reason]:
    """Heads that give one output a row, read at a fixed place of it: pooled or at the last token."""
    pooled = any(getattr(one, "pooler", None) is not None for one in (model, *model.children()))
    kinds = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction", "ForQuestionAnswering")
    if pooled or type(model).__name__.endswith(kinds):
        return [Reason("model", "it gives one output a row, read at a fixed place")]
    return []


def _text_model(model: torch.nn.Module) -> torch.nn.Module:
    from transformers import PreTrainedModel

    config: Any = model.config
    text = config.get_text_config()
    if text is config:
        return model
    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text]
    return inner[0] if inner else model


@functools.cache
def _counts_tokens(cls: Any) -> bool:
    """Whether the forward of a layer numbers its tokens itself: ``torch.arange`` over a length."""
    from transformers import PreTrainedModel

    if issubclass(cls, PreTrainedModel) or not cls.__module__.startswith("transformers"):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ranges = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "torch.arange"]
    return any(word in text for text in ranges for word in ("shape", "size(", "length", "seq_len"))


def _uses_count(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "attn_temperature_tuning", True)) and not getattr(module, "use_rope", False)
