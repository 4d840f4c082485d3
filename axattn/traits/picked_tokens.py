"""Tokens that a head finds by id, not by the mask: they may be padding.

Read from the source of its forward: heads that classify rows find the last token that is not ``config.pad_token_id``,
those of encoder-decoders the last EOS token, text towers of the CLIP family the first EOS token or the largest id.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from axattn.errors import InvalidInputError, Reason
from axattn.hf.forward_inputs import tokens_of
from axattn.hf.model_internals import window_of
from axattn.hf.source_inspection import code_of, source_of, tree_of
from axattn.hf.torch_internals import is_tracing, require_when_run
from axattn.hf.weak_cache import weak_cache

How = Literal["last_not_pad", "before_pad", "as_many", "last_end", "first_end", "largest_id", "other"]


@dataclass(frozen=True, slots=True)
class Pick:
    """How a head finds its token.

    Attributes:
        how: ``last_not_pad``: the last that is not ``config.pad_token_id``, with embeddings the last; in older code
            ``before_pad``: the one before the first pad token, or ``as_many``: index = number of non-pad tokens - 1;
            ``last_end``, ``first_end``: the last or first ``eos_token_id``; ``largest_id``: that with the largest id;
            ``other``: by id in an unknown way.
        mask: the keyword of the mask for these tokens.
        shift: 1 if it is one token further to the right (a decoder's inputs are shifted).
    """

    how: How
    mask: str = "attention_mask"
    shift: int = 0


def picks_of(model: torch.nn.Module, parts: Iterable[torch.nn.Module]) -> tuple[Pick, ...]:
    """How a model finds the tokens that its outputs are read from.

    Args:
        model: a ``PreTrainedModel``.
        parts: the model and its direct children that are not models.
    """
    decodes = bool(getattr(model.config, "is_encoder_decoder", False))
    mask, shift = ("decoder_attention_mask", 1) if decodes else ("attention_mask", 0)
    found = []
    for part in parts:
        cls: Any = code_of(part)
        source = source_of(cls.forward)
        if "last_non_pad_token" in source:
            found.append(Pick("last_not_pad", mask, shift))
        elif "eos_mask" in source and "input_ids" in source:
            found.append(Pick("last_end", mask))
        else:
            hows: frozenset[How] = _by_ids(cls.forward)
            if "eos_token_id == 2" in source and hows == {"first_end", "largest_id"}:  # the first CLIP checkpoints
                hows = frozenset(("largest_id" if getattr(part, "eos_token_id", None) == 2 else "first_end",))
            found += [Pick(how) for how in sorted(hows)]
    return tuple(found)


@weak_cache
def _by_ids(forward: Any) -> frozenset[How]:
    """How ``forward`` computes indices from ids: ``input_ids.argmax(-1)``, ``(input_ids == token).int().argmax(-1)`` or
    ``(input_ids != token).sum(-1)``."""
    tree, found = tree_of(forward), set[How]()
    for node in () if tree is None else ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        text, name = ast.unparse(node.func.value), node.func.attr
        if "input_ids" not in text or name not in ("argmax", "sum"):
            continue
        compared = any(how in text for how in ("==", "!=", ".eq(", ".ne("))
        if name == "sum":
            found |= {"as_many"} if "pad_token_id" in text and compared else set()
        elif "pad_token_id" in text:
            found.add("before_pad" if "==" in text or ".eq(" in text else "other")
        elif "eos_token_id" in text:
            found.add("first_end")
        else:
            found.add("other" if compared else "largest_id")
    return frozenset(found)


def padding_is_read(
    picks: Iterable[Pick], native: str | None, model: torch.nn.Module, given: Mapping[str, Any]
) -> bool:
    """Whether a token that a head picks in this forward is padding; only dense masks then match eager attention.

    Args:
        picks: how its tokens are found.
        native: the native name of the model, None for axattn backends.
        model: the model with the head.
        given: its inputs, by name.

    Raises:
        InvalidInputError: it is, on a name for which Transformers unpads, or if its window holds only padding. A
            compiled graph asserts when it runs that no such token is padding.
    """
    if native in ("eager", "sdpa"):
        return False
    for pick in picks:
        mask, at = given.get(pick.mask), column_of(pick, model, given)
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            continue
        if pick.how == "other" and native is None:
            return True
        if at is None or mask.shape[0] != at.shape[0]:
            continue
        tokens = tokens_of(given)
        held = mask.shape[1] - (0 if tokens is None else tokens.shape[1])  # tokens of a cache or prefix
        if held < 0 or (held and pick.mask != "attention_mask"):
            continue
        real = (mask != 0).to(at.device)
        at = at[:, None] + held
        read = real.gather(1, at)[:, 0] | ~real.any(-1)  # rows without real tokens are ignored
        what, advice = _message_parts(pick, model, given)
        text = f"{type(model).__name__} reads {what}, and that is padding"
        if is_tracing():
            require_when_run(read.all(), text)
        elif not bool(read.all()):
            index = torch.arange(mask.shape[1], device=at.device)
            nearest = torch.where(real & (index <= at), index, -1).amax(-1)
            blind = ~read & ((nearest < 0) | (at[:, 0] - nearest >= _reach(model, mask.shape[1])))
            if native is None and not bool(blind.any()):
                return True
            advice = f'{advice} Or use attn_implementation="eager".'
            raise InvalidInputError(f"{type(model).__name__} reads padding", [Reason("padding", text)], advice)
    return False


def _reach(model: torch.nn.Module, length: int) -> int:
    """How many tokens back every layer attends for certain."""
    config: Any = model.config
    chunk = getattr(config.get_text_config(), "attention_chunk_size", None)
    return 0 if chunk is not None and chunk < length else min(window_of(model) or length, length)


def column_of(pick: Pick, model: torch.nn.Module, given: Mapping[str, Any]) -> torch.Tensor | None:
    """int64 ``[B]``: the index of the picked token in each row; None without ``[B, S]`` tokens.

    Args:
        pick: how it is found.
        model: the model with the head.
        given: the inputs of its forward, by name.
    """
    tokens, ids = tokens_of(given), given.get("input_ids")
    if tokens is None or tokens.ndim != (2 if tokens is ids else 3):
        return None
    config: Any = model.config
    rows, length = tokens.shape[:2]
    last = torch.full((rows,), length - 1, device=tokens.device)
    if pick.how in ("last_not_pad", "before_pad", "as_many"):
        pad = config.get_text_config().pad_token_id
        if ids is None or pad is None:
            return last
        real: torch.Tensor = ids != pad
        if pick.how == "before_pad":
            return ((~real).int().argmax(-1) - 1) % length
        if pick.how == "as_many":
            return (real.sum(-1) - 1) % length
        at = (torch.arange(length, device=ids.device) * real).argmax(-1)
        return (at + pick.shift).clamp(max=length - 1)
    if ids is None or pick.how == "other":
        return None
    if pick.how == "largest_id":
        largest: torch.Tensor = ids.argmax(-1)
        return largest
    end: torch.Tensor = (ids == _eos_token_id(model)).int()
    return end.argmax(-1) if pick.how == "first_end" else last - end.flip(-1).argmax(-1)


def _eos_token_id(model: torch.nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config().eos_token_id


def _message_parts(pick: Pick, model: torch.nn.Module, given: Mapping[str, Any]) -> tuple[str, str]:
    """The description of the picked token for a message, and the advice if it is padding."""
    config: Any = model.config
    if pick.how in ("last_not_pad", "before_pad", "as_many"):
        pad = config.get_text_config().pad_token_id
        if given.get("input_ids") is None:
            return "the last token of each row, where it is given inputs_embeds", _side("left")
        if pad is None:
            return "the last token of each row, where config.pad_token_id is None", _side("left")
        found = f"the last token of each row that is not config.pad_token_id ({pad})"
        return found, "Set config.pad_token_id to the id that rows are padded with."
    if pick.how == "largest_id":
        return "the token with the largest id of each row", "Pad with a smaller id."
    which = "first" if pick.how == "first_end" else "last"
    return f"the {which} token of each row that is eos_token_id ({_eos_token_id(model)})", _side("right")


def _side(side: str) -> str:
    return f'Set tokenizer.padding_side = "{side}".'
