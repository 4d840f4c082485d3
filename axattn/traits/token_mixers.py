"""Token mixers outside of attention: read from a model's config, its modules and their source, and from a run of the
code around its layers (`axattn.hf.probes`).

Such layers ignore document boundaries: packed rows leak through them, and rows can't be split or joined.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.errors import Reason
from axattn.hf import probes
from axattn.hf.module_walk import attribute, modules_of, named_modules
from axattn.hf.source_inspection import calls_interface, code_of, source_of
from axattn.traits.recurrent import recurrent

ATTENTION = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "moe", "sparse", "mlp"}
)
"""Transformers' layer types that mix tokens only in attention (the last four name what follows it)."""


def mixers(model: torch.nn.Module, *, by_document: bool = False) -> list[Reason]:
    """Layers of a text model that mix tokens outside of attention: state spaces, convolutions, linear attention.

    Args:
        model: a ``PreTrainedModel``; of a composite one the text model is read.
        by_document: leave out layers that run document by document (`axattn.traits.recurrent`, `scaled_by_share`).
    """
    text = text_model(model)
    apart = [one.name for one in recurrent(text)] if by_document else []
    kinds = _other_kinds(text, apart)
    if kinds:
        return [Reason("model", f"its layers of type {', '.join(sorted(kinds))} mix tokens outside of attention")]
    named: list[tuple[str, Any]] = [(name, type(module)) for name, module in named_modules(text)]
    convolutions = [
        name
        for name, cls in named
        if issubclass(cls, torch.nn.Conv1d) and not any(name.startswith(f"{one}.") for one in apart)
    ]
    if convolutions:
        return [Reason("model", f"{convolutions[0]} (a convolution) mixes neighbouring tokens")]
    shifts = [name for name, module in named_modules(text) if _shifts_tokens(module)]
    if shifts:
        return [Reason("model", f"{shifts[0]} puts neighbouring tokens together")]
    shares = [] if by_document else [name for name, _ in scaled_by_share(text)]
    if shares:
        return [Reason("model", f"{shares[0]} scales a row by its share of masked tokens (token_dropout)")]
    if not apart and not any(calls_interface(cls) for _, cls in named):
        return [Reason("model", f"{type(text).__name__} mixes tokens in layers of its own, not in attention")]
    run = None if by_document and scaled_by_share(text) else probes.token_mixing(text)
    if run is not None and run.tokens:
        return [probes.disagreement(text, "only its layers mix tokens", "something before or after them does too")]
    return []


def scaled_by_share(text: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Embeddings that are scaled by the share of masked tokens in a row (ESM's token dropout), by name."""
    return [
        (name, module)
        for name, module in named_modules(text)
        if attribute(module, "token_dropout") is True and "mask_token_id" in source_of(code_of(module).forward)
    ]


def _other_kinds(text: torch.nn.Module, apart: list[str]) -> set[str]:
    """Types of layers that mix tokens outside of attention, except layers with a module in `apart`."""
    config: Any = text.config
    every = list(map(str, getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()))
    lists = [name for name, m in named_modules(text) if isinstance(m, torch.nn.ModuleList) and len(m) == len(every)]
    return {
        kind
        for number, kind in enumerate(every)
        if kind not in ATTENTION
        and ("attention" not in kind or "linear" in kind or "compressed" in kind)
        and not any(one.startswith(f"{name}.{number}.") for name in lists[:1] for one in apart)
    }


def text_model(model: torch.nn.Module) -> torch.nn.Module:
    """The part of a ``PreTrainedModel`` that reads tokens: its text model, or itself."""
    from transformers import PreTrainedModel

    config: Any = model.config
    text = config.get_text_config()
    if text is config:
        return model
    inner = [m for m in modules_of(model) if isinstance(m, PreTrainedModel) and m.config is text]
    return inner[0] if inner else model


def _shifts_tokens(module: torch.nn.Module) -> bool:
    """MobileBERT embeds three neighbouring tokens together; RWKV's layers shift tokens by a padding layer."""
    if isinstance(module, torch.nn.ZeroPad2d):
        return True
    return bool(attribute(module, "trigram_input")) and "functional.pad(" in source_of(code_of(module).forward)
