"""``s2``: shifted sparse attention (LongLoRA, arXiv:2309.12307, section 3.2) as two variable-length calls.

In training each half of the heads attends within groups of tokens; the groups of the second half are shifted by half a
group. Here the shift moves the group boundaries instead of rolling the tokens, so nothing wraps around from the end of
a row to its start (the paper's roll leaks there). In evaluation it is full attention, as in the paper.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch

from axattn.backends import varlen
from axattn.backends.base import FLOATS, Backend, Variant, always_usable
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine.packed import over_layout
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.varlen_layout import Layout, Span
from axattn.spec.capability import Capability
from axattn.spec.options import Option

GROUP_SIZE = 0.25  # the paper's: a group is a quarter of the row


def _wrong_group_size(given: Any) -> str:
    tokens = isinstance(given, int) and not isinstance(given, bool) and given >= 2
    share = isinstance(given, float) and 0 < given <= 1
    return "" if tokens or share else "is neither a number of tokens (2 or more) nor a share of the row (0 < x <= 1)"


CAPABILITY = Capability(
    exactness="lossy",
    devices=frozenset({"cpu", "cuda"}),
    dtypes=FLOATS,
    value_dim_differs=True,
    grouped_heads=True,
    causal=True,
    padding=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
    traced=True,
    notes={"": "deprecated; LLaMA only; sparse in training, full attention in evaluation"},
)


def s2(call: AttentionCall) -> torch.Tensor:
    """Shifted sparse attention in training, full attention in evaluation; returns ``[B, S, H, Dv]``.

    Raises:
        UnsupportedAttentionError: in training, heads that can't be halved, or a mask without a compact form.
    """
    if not call.module.training or call.query.shape[2] != call.key.shape[2]:
        call.ran = "varlen"
        return varlen.varlen(call)
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    reasons = [
        Reason("heads", f"{count} {kind} heads can't be halved")
        for kind, count in (("query", heads), ("KV", kv_heads))
        if count % 2
    ]
    everywhere = getattr(getattr(call.module, "config", None), "num_attention_heads", heads)
    if heads != everywhere:  # which half shifts is counted over the whole model
        reasons.append(Reason("heads", f"{heads} of its {everywhere} heads are here (tensor parallelism)"))
    layout = call.mask.layout() if isinstance(call.mask, LazyMask) else None
    if layout is None:
        reasons.append(Reason("dense_mask", "the mask has no compact form"))
    if layout is None or reasons:
        raise UnsupportedAttentionError("s2 can't serve this call", reasons, 'Use attn_implementation="varlen".')
    group = group_tokens(BACKENDS[0].option(call, "group_size"), call.query.shape[2])
    halves = []
    for half, shift in ((0, 0), (1, group // 2)):
        q = slice(half * heads // 2, (half + 1) * heads // 2)
        kv = slice(half * kv_heads // 2, (half + 1) * kv_heads // 2)
        groups = grouped(layout, group, shift)
        part = dataclasses.replace(call, query=call.query[:, q], key=call.key[:, kv], value=call.value[:, kv])
        part.mask = _mask_of(groups, call.query.device)
        halves.append(over_layout(part, groups))  # counted as s2 under a dense mask too: it is no full attention
    return torch.cat(halves, dim=2)


def _mask_of(groups: Layout, device: torch.device) -> LazyMask:
    """Of the groups, for what has no kernel over spans (float32 on a GPU): dense only there."""
    return LazyMask(
        shape=(groups.rows, 1, groups.q_length, groups.kv_length),
        pattern=None,
        segments=None,
        padding=None,
        materialise=functools.partial(groups.dense, device),
        device=device,
    )


def group_tokens(group_size: float, length: int) -> int:
    """Tokens in a group: `group_size` itself, or that share of the row if it is a float (rounded up)."""
    return math.ceil(group_size * length) if isinstance(group_size, float) else group_size


def grouped(layout: Layout, group: int, shift: int) -> Layout:
    """Cut the spans of a layout at ``shift, shift + group, shift + 2 * group, ...`` (positions within the row).

    Args:
        layout: causal, without packed documents.
        group: tokens in a group; the first and the last may be shorter.
        shift: where the first boundary lies; 0 for the unshifted half.
    """

    def make() -> Layout:
        spans = []
        for row0, row1, q0, q1, _, _ in layout.spans:
            inner = range(shift if shift else group, q1, group)
            edges = [q0, *(e for e in inner if q0 < e < q1), q1]
            spans += [Span(row0, row1, a, b, a, b) for a, b in pairwise(edges)]
        return dataclasses.replace(layout, spans=tuple(spans), memo={})

    return layout.kept(f"s2-{group}-{shift}", make)


def _model_reasons(model: str, path: str, kinds: Collection[str]) -> list[Reason]:
    llama = "llama" in model.lower() and "llama4" not in model.lower()
    if llama and not path and set(kinds) <= {"full_attention"}:
        return []
    return [Reason("model", "shifted sparse attention is defined for LLaMA models only")]


_GROUP_SIZE = Option("group_size", GROUP_SIZE, "tokens in a group, or its share of the row", _wrong_group_size)
BACKENDS = (
    Backend(
        "s2",
        "shifted sparse attention (LongLoRA), deprecated",
        CAPABILITY,
        always_usable,
        s2,
        options=(_GROUP_SIZE,),
        spans=True,
        variant=Variant("varlen", _model_reasons),
    ),
)
