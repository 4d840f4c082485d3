"""Recurrent layers, which carry a state along a row (state spaces, linear attention, short convolutions).

Such a layer ignores document boundaries: the state of one document leaks into the next. As it is causal, tokens after a
document don't change it, so each document can run in its own row, padded on the right. Transformers passes cu_seq_lens
to kernels of other libraries for this, and its own fallbacks ignore them (transformers 5.23,
``torch_chunk_gated_delta_rule``).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from axattn.hf.forward_inputs import CACHES
from axattn.hf.module_walk import named_modules
from axattn.hf.source_inspection import calls_interface, calls_of, code_of
from axattn.hf.weak_cache import weak_cache

_INPUTS = frozenset(CACHES) | {"hidden_states", "attention_mask", "cache_position"}


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer that can run document by document.

    Attributes:
        name: its path in the model that was read.
        parent: the module that calls it.
        mask: the parameter of the parent's ``forward`` that is passed to it as 2-D ``attention_mask``.
        module: the layer: ``(hidden_states [B, S, C], cache, attention_mask [B, S] or None)`` → ``[B, S, C]``.
    """

    name: str
    parent: torch.nn.Module
    mask: str
    module: torch.nn.Module


def recurrent(model: torch.nn.Module) -> Iterator[Recurrent]:
    """Every such layer of a model.

    Read from the source: it has a convolution, its ``forward`` takes only hidden states, a cache (so it is causal) and
    a 2-D mask, and a decoder layer passes its own mask to it. Modules inside such a layer are not listed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for path, parent in named_modules(model):
        if not isinstance(parent, GradientCheckpointingLayer):
            continue
        for name, child in parent.named_children():
            if _is_recurrent(child):
                mask = _mask_of(code_of(parent).forward, name)
                if mask:
                    yield Recurrent(f"{path}.{name}" if path else name, parent, mask, child)


def _is_recurrent(module: torch.nn.Module) -> bool:
    if not any(isinstance(child, torch.nn.Conv1d) for child in module.children()):
        return False
    cls = code_of(module)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = [p.name for p in list(inspect.signature(cls.forward).parameters.values())[1:] if p.kind not in kinds]
    taken = set(named)
    first = named[:1] == ["hidden_states"] and "attention_mask" in taken
    return first and bool(taken & set(CACHES)) and taken <= _INPUTS and not calls_interface(cls)


@weak_cache
def _mask_of(forward: Any, child: str) -> str:
    """The parameter of a ``forward`` that its calls of ``self.<child>`` get as ``attention_mask``, "" for none."""
    values = [
        kw.value for call in calls_of(forward, f"self.{child}") for kw in call.keywords if kw.arg == "attention_mask"
    ]
    found = {value.id if isinstance(value, ast.Name) else "" for value in values}
    return found.pop() if len(found) == 1 and found <= {*inspect.signature(inspect.unwrap(forward)).parameters} else ""
