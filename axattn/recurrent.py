"""Layers that carry a state along a row (state spaces, linear attention, short convolutions), and documents in them.

Such a layer knows nothing of documents: what one leaves in the state reaches the next. A causal layer does not see what
comes behind a document, so documents can be laid beside each other as rows, padded on the right: each then runs as it
would alone. Transformers' own code for this goes through cu_seq_lens to kernels of other libraries, and its own
fallbacks ignore those (transformers 5.23, ``torch_chunk_gated_delta_rule``).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from axattn.hf.forward_inputs import CACHES
from axattn.hf.source_inspection import calls_interface, calls_of, code_of
from axattn.segments import Segments
from axattn.weak_cache import weak_cache

_INPUTS = frozenset(CACHES) | {"hidden_states", "attention_mask", "cache_position"}
_LOOSE = 1.5
"""Padding up to half of the tokens is taken for one call instead of several."""


@dataclass(frozen=True)
class Recurrent:
    """A layer that carries a state, and can be run document by document.

    Attributes:
        name: its path in the model that was read.
        parent: the module that calls it.
        mask: the parameter of the parent's ``forward`` that it is given as its 2-D ``attention_mask``.
        module: itself: ``(hidden_states [B, S, C], cache, attention_mask [B, S] or None)`` → ``[B, S, C]``.
    """

    name: str
    parent: torch.nn.Module
    mask: str
    module: torch.nn.Module


def recurrent(model: torch.nn.Module) -> Iterator[Recurrent]:
    """Every such layer of a model.

    Read in the source: a convolution in it, a ``forward`` of hidden states, a cache (so it is causal) and a 2-D mask
    and nothing else, and a decoder layer that hands on its own mask. A part of such a layer is none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for path, parent in model.named_modules():
        if not isinstance(parent, GradientCheckpointingLayer):
            continue
        for name, child in parent.named_children():
            if _carries(child):
                mask = _mask_of(code_of(parent).forward, name)
                if mask:
                    yield Recurrent(f"{path}.{name}" if path else name, parent, mask, child)


def _carries(module: torch.nn.Module) -> bool:
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


class Group(NamedTuple):
    """Documents of like lengths as rows.

    Attributes:
        tokens: int64 ``[documents, longest]``, the flat index of each token; behind its end a document's last again.
        real: bool of that shape, False behind the end of a document.
        places: int64 ``[N]``: where in ``[documents * longest]`` the real ones are.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    places: torch.Tensor

    def real_ones(self, x: torch.Tensor) -> torch.Tensor:
        """The real tokens of what the rows gave: ``[documents, longest, ...]`` → ``[N, ...]``."""
        return x.flatten(0, 1).index_select(0, self.places)


class Documents(NamedTuple):
    """The documents of packed rows as rows of their own.

    Attributes:
        groups: all of them, every token of the rows in one.
        back: int64 ``[B * S]``: where each token of the rows is among the real tokens of the groups, one after another.
    """

    groups: tuple[Group, ...]
    back: torch.Tensor

    def in_place(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The real tokens of each group, ``[N, ...]``, where they are in the rows: ``[B * S, ...]``."""
        return torch.cat(parts).index_select(0, self.back)


def as_rows(segments: Segments, device: torch.device) -> Documents:
    """The documents of a forward as rows, worked out once for all layers."""
    if device not in segments.memo:
        segments.memo[device] = _as_rows(segments, device)
    found: Documents = segments.memo[device]
    return found


def _as_rows(segments: Segments, device: torch.device) -> Documents:
    spans = [
        (row * segments.length + a, b - a) for row, edges in enumerate(segments.boundaries) for a, b in pairwise(edges)
    ]
    groups, order = [], []
    for members in _alike(spans):
        start, length = torch.tensor(members).unbind(1)
        at = torch.arange(int(length.max()))
        real = at < length[:, None]
        tokens = start[:, None] + torch.minimum(at, length[:, None] - 1)
        order.append(tokens[real])
        groups.append(Group(*(x.to(device) for x in (tokens, real, real.flatten().nonzero()[:, 0]))))
    return Documents(tuple(groups), torch.cat(order).argsort().to(device))


def _alike(spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Spans in groups: one where that wastes little, else those of up to twice the shortest's length together."""
    lengths = [length for _, length in spans]
    if len(spans) * max(lengths) <= _LOOSE * sum(lengths):
        return [spans]
    found: dict[int, list[tuple[int, int]]] = {}
    for span in spans:
        found.setdefault(span[1].bit_length(), []).append(span)
    return list(found.values())
