"""Refuses inputs that Transformers' flash path would ignore silently. Pure checks over a call's inputs.

The flash path does not use the mask function: documents, image blocks and positions reach the kernel in other ways, or
not at all. Measured on transformers 5.17 and 5.23 with strict fakes of the kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch

from axattn.documents.boundaries import Segments
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf import determinism
from axattn.hf.forward_inputs import LENGTHS, TOKEN_TYPES, tokens_of
from axattn.hf.source_inspection import calls_of, code_of
from axattn.hf.weak_cache import weak_cache

_ADVICE = 'Use attn_implementation="varlen" or "auto".'


def require_deterministic(native: str, lacking: Iterable[Reason], module: torch.nn.Module) -> None:
    """Raise, or warn, if a deterministic gradient is requested and the kernel has none.

    Args:
        native: a flash name.
        lacking: why its kernel has no deterministic gradient; empty if it has one.
        module: the model, in its forward.

    Raises:
        UnsupportedAttentionError: in training, unless ``warn_only`` is set.
    """
    given, fix = determinism.required_on_native(module.config)
    if not (given or torch.are_deterministic_algorithms_enabled()) or not torch.is_grad_enabled():
        return
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    reasons = [*lacking]
    if not given:
        text = "Transformers does not pass torch.use_deterministic_algorithms on to it"
        reasons.insert(0, Reason("deterministic", text, fix))
    if reasons and determinism.required(given):
        fixes = "".join(f"Set {reason.fix}. " for reason in reasons if reason.fix)
        text = f"{native} can't serve {type(module).__name__} in training"
        advice = 'Use attn_implementation="varlen", or torch.use_deterministic_algorithms(True, warn_only=True).'
        raise UnsupportedAttentionError(text, reasons, fixes + advice)
    for reason in reasons:
        warnings.warn(f"axattn: {reason.text}", UserWarning, stacklevel=2)  # Python's filter shows each text once


def require_served(
    native: str, inputs: dict[str, Any], windowed: bool, *, image_blocks: bool, reads_padding: bool
) -> None:
    """Raise for inputs that the flash path would ignore; the model's properties are fields of
    `axattn.traits.model_traits.ModelTraits`.

    Raises:
        UnsupportedAttentionError: image blocks, non-contiguous padding with a sliding window, padding that a head
            reads, or as many targets as padded source tokens.
    """
    reasons: list[Reason] = []
    if _crosses_padding(inputs):
        text = "as many targets as source tokens, some of them padding: the flash path takes both for one sequence"
        reasons.append(Reason("padding", text))
    if image_blocks and has_image_tokens(inputs):
        text = "tokens of an image attend to each other in both directions, and the flash path is causal throughout"
        reasons.append(Reason("dense_mask", text))
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        if reads_padding and not bool((mask != 0).all()):
            text = "its head reads padding too, for which the flash path computes no attention"
            reasons.append(Reason("padding", text))
        if windowed and _is_non_contiguous(mask):
            text = "padding between real tokens: the flash path takes it out, and the window then reaches too far"
            reasons.append(Reason("padding", text))
    if reasons:
        raise UnsupportedAttentionError(f"{native} can't serve this batch", reasons, _ADVICE)


def has_image_tokens(inputs: dict[str, Any]) -> bool:
    """Whether the inputs mark some tokens as part of an image."""
    kinds = [given for name in TOKEN_TYPES if isinstance(given := inputs.get(name), torch.Tensor)]
    return any(bool(given.any()) for given in kinds)


def _crosses_padding(inputs: dict[str, Any]) -> bool:
    """Whether cross-attention over a padded source has as many queries as keys: Transformers' ``_upad_input`` then
    unpads the queries by the source's mask (transformers 5.23)."""
    source, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
    tokens = tokens_of(inputs)
    if not (isinstance(source, torch.Tensor) and isinstance(mask, torch.Tensor) and isinstance(tokens, torch.Tensor)):
        return False
    return source.shape[1] == tokens.shape[1] and mask.ndim == 2 and not bool(mask.all())


def _is_non_contiguous(mask: torch.Tensor) -> bool:
    real = (mask != 0).to(torch.int32)
    span = real.shape[-1] - real.argmax(-1) - real.flip(-1).argmax(-1)
    return bool(((real.sum(-1) > 0) & (real.sum(-1) != span)).any())


@weak_cache
def passes_keywords(cls: Any) -> bool:
    """Whether an attention class passes its ``**kwargs`` on to the attention function (read in its source)."""
    found = calls_of(cls.forward, "attention_interface")
    return bool(found) and all(any(kw.arg is None for kw in call.keywords) for call in found)


def require_position_per_token(
    native: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise if the flash path gets a single row whose positions are not one per token: it reads documents from them,
    and its cumulative lengths then exceed the number of tokens.

    Planes of positions (GLM-4.5V; transformers 5.23), heights and widths of patches (Pixtral; 5.17).

    Raises:
        UnsupportedAttentionError: this attention module gets such positions.
    """
    positions, hidden = kwargs.get("position_ids"), kwargs.get("hidden_states", next(iter(args), None))
    if not isinstance(positions, torch.Tensor) or not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        return
    rows, length = hidden.shape[:2]
    if rows == 1 and tuple(positions.shape) not in ((1, length), (length,)):
        shape = "planes of positions" if positions.ndim == 3 else f"positions of shape {list(positions.shape)}"
        text = f"{type(module).__name__} is given {shape} for {length} tokens, and would read past its row"
        raise UnsupportedAttentionError(f"{native} can't serve this batch", [Reason("position_ids", text)], _ADVICE)


def require_reached(native: str, module: torch.nn.Module, kwargs: dict[str, Any], segments: Segments) -> None:
    """Raise unless the document boundaries of a packed forward reach this attention module.

    Raises:
        UnsupportedAttentionError: they do not, so documents would leak (ModernBERT, Llama 4; transformers 5.23).
    """
    cls = code_of(module)
    lengths = all(kwargs.get(name) is not None for name in LENGTHS)
    if not passes_keywords(cls) or not (lengths or not packed_reasons(native, kwargs, segments)):
        raise UnsupportedAttentionError(
            f"packed rows would leak on {native}",
            [Reason("segments", f"the lengths of the documents do not reach {cls.__name__}")],
            _ADVICE,
        )


def lengths_of(segments: Segments) -> dict[str, Any]:
    """The four keywords from which Transformers' flash path reads documents; int maxima for FlashAttention 4."""
    longest = max(b - a for row in segments.boundaries for a, b in pairwise(row))
    edges = segments.cu_seqlens
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def packed_reasons(
    native: str, inputs: dict[str, Any], segments: Segments, *, lengths_follow: bool = False
) -> list[Reason]:
    """Why packed rows would leak: they need all four lengths, or one row whose documents start at the same position.

    Args:
        native: the flash name.
        inputs: of the forward.
        segments: the documents.
        lengths_follow: the input hook adds the lengths to the inputs.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool((mask != 0).all()):
        return [
            Reason("padding", "with padding the flash path reads the mask, and the lengths of the documents no more")
        ]
    given = [name for name in LENGTHS if inputs.get(name) is not None]
    if lengths_follow or len(given) == len(LENGTHS):
        return []
    reasons = []
    if given:
        absent = ", ".join(name for name in LENGTHS if name not in given)
        reasons.append(Reason("segments", f"Transformers reads the lengths only when all are given; missing: {absent}"))
    if segments.rows > 1:
        reasons.append(Reason("segments", "Transformers' flash path separates documents only when there is one row"))
    positions = inputs.get("position_ids")
    if not isinstance(positions, torch.Tensor):
        reasons.append(Reason("segments", "neither cu_seq_lens nor position_ids reach the kernel"))
    elif segments.rows == 1:
        flat = positions.reshape(-1)
        starts = [int(flat[at]) for at in segments.boundaries[0][:-1]]
        if len(set(starts)) > 1:
            reasons.append(Reason("segments", "documents start at different positions, which the flash path merges"))
    if not reasons and native == "flash_attention_4":
        text = "it requires its longest document as an int, and gets a tensor unless max_length_q and _k are given"
        reasons.append(Reason("segments", text))
    return reasons
