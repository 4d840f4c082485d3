"""How a model numbers its tokens: whether it reads ``position_ids``, where they start, how it counts without them."""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch

from axattn.errors import Reason
from axattn.hf.source_inspection import calls_of, code_of, file_source, signature_of, source_of, tree_of
from axattn.mixing import text_model

_OWN_COUNT = "create_position_ids_from_input_ids"
"""What Transformers calls fairseq's numbering: tokens that are not padding count from ``padding_idx + 1``."""


def unread_positions(model: torch.nn.Module) -> list[Reason]:
    """Why ``position_ids`` can't tell a model where a document starts: no forward in it takes them (BART's decoder), or
    one ignores them (CSM's depth decoder, which also chooses weights by a token's place in the row).

    Relative position biases (T5) need none: they are the same in every document.

    Args:
        model: a ``PreTrainedModel``; of a composite one its text model is read.
    """
    from transformers import PreTrainedModel

    text = text_model(model)
    inner = [module for module in text.modules() if isinstance(module, PreTrainedModel)]
    dropping = [type(one).__name__ for one in inner if _drops_positions(code_of(one).forward)]
    if dropping:
        return [Reason("position_ids", f"{dropping[0]} ignores position_ids, and counts along the whole row")]
    if any("position_ids" in signature_of(one).parameters for one in inner):
        return []
    if any(name.endswith("relative_attention_bias") for name, _ in text.named_modules()):
        return []
    return [Reason("position_ids", f"{type(text).__name__} takes no position_ids, and counts along the whole row")]


def counters(model: torch.nn.Module) -> list[Reason]:
    """Layers that number the tokens they see themselves, whatever ``position_ids`` say (Llama 4's without RoPE)."""
    kinds: dict[str, Any] = {name: code_of(module) for name, module in model.named_modules() if _uses_count(module)}
    counting = [name for name, cls in kinds.items() if _counts_tokens(cls)]
    return [Reason("model", f"{name} counts positions among the tokens that it sees") for name in counting[:1]]


def first_position(model: torch.nn.Module) -> int:
    """The position of a row's first token: 0, or ``padding_idx + 1`` in the families of RoBERTa."""
    for module in text_model(model).modules():
        padding = getattr(module, "padding_idx", None)
        if getattr(module, "position_embedding_type", "") == "rotary":  # ESM-2: only differences of positions are seen
            continue
        if isinstance(padding, int) and _OWN_COUNT in source_of(code_of(module).forward):
            return padding + 1
    return 0


def own_positions(model: torch.nn.Module, ids: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """The positions that a model gives the tokens of a padded batch where none are given.

    Args:
        model: the model.
        ids: ``[B, S]`` token ids, None where embeddings are given.
        mask: ``[B, S]``, nonzero for real tokens.

    Returns:
        int64 ``[B, S]``.
    """
    return counted(first_position(model), counts_mask(code_of(model)), ids, mask)


def counted(first: int, by_mask: bool, ids: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """`own_positions` of a model of which `first_position` and `counts_mask` are known."""
    if first and ids is not None:
        real = ids.ne(first - 1).long()
        return real.cumsum(-1) * real + first - 1
    if not first and by_mask:
        return ((mask != 0).cumsum(-1) - 1).clamp(min=0)
    return torch.arange(first, first + mask.shape[1], device=mask.device).expand(mask.shape)


@functools.cache
def _drops_positions(forward: Any) -> bool:
    """Whether a forward sets ``position_ids`` to None where they are given."""
    tree = tree_of(forward)
    given = [
        node
        for node in (() if tree is None else ast.walk(tree))
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith("position_ids is not None")
    ]
    return any(ast.unparse(line) == "position_ids = None" for node in given for line in node.body)


@functools.cache
def counts_mask(cls: Any) -> bool:
    """Whether a model's file computes positions from the attention mask where none are given (OPT).

    BioGPT's could, but its decoder always hands it positions counted along the row.
    """
    source = file_source(cls.__module__)
    counted = "cumsum(attention_mask" in source or "attention_mask.cumsum" in source
    return counted and "position_ids = torch.arange(" not in source


@functools.cache
def _counts_tokens(cls: Any) -> bool:
    """Whether the forward of a layer numbers its tokens itself: ``torch.arange`` over a length, and not only where no
    ``position_ids`` are given."""
    from transformers import PreTrainedModel

    if issubclass(cls, PreTrainedModel) or not cls.__module__.startswith("transformers"):
        return False
    if "if position_ids is None" in source_of(cls.forward):
        return False
    ranges = [ast.unparse(call) for call in calls_of(cls.forward, "torch.arange")]
    return any(word in text for text in ranges for word in ("shape", "size(", "length", "seq_len"))


def _uses_count(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "attn_temperature_tuning", True)) and not getattr(module, "use_rope", False)
