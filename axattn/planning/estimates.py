"""The cost of a plan's attention at a sequence length: computed from the plan, not measured. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from axattn.errors import InvalidConfigError
from axattn.planning.plan import LayerPlan, Plan

_HALF = 2
"""Bytes of a 16-bit number."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One layer, one row of `seq_len` tokens (one document), 16 bit.

    Attributes:
        flops: of Q.K^T and P.V in the forward; backward takes 2.5 times as many.
        kv_bytes: keys and values in a cache (at most a window of them).
        extra_bytes: memory of the kernel besides its output: a dense mask (``sdpa``), or the weights (``eager``);
            by chunk, which run as rows of their own (`axattn.backends.by_document`).
    """

    flops: int
    kv_bytes: int
    extra_bytes: int


def estimate(entry: LayerPlan, seq_len: int) -> Estimate:
    """The cost of one layer.

    Raises:
        InvalidConfigError: `seq_len` is not positive.
    """
    if seq_len < 1:
        raise InvalidConfigError(f"seq_len={seq_len} is not a length", advice="Give a number of tokens, 1 or more.")
    need = entry.layer.need
    heads, kv_heads = need.heads or 1, need.kv_heads or need.heads or 1
    size, value_size = need.head_dim or 0, need.value_dim or need.head_dim or 0
    span = min(seq_len, need.window or need.chunk or seq_len)
    if need.window is None and need.chunk is not None:
        pairs = sum(_triangle(min(span, seq_len - start)) for start in range(0, seq_len, span))
    elif not need.causal:
        pairs = seq_len * min(seq_len, 2 * span - 1) if need.window else seq_len * seq_len
    else:
        pairs = _triangle(span) + (seq_len - span) * span
    cells = _cells(entry, seq_len)
    extra = {"sdpa": cells, "eager": heads * cells * (4 + _HALF)}.get(entry.chosen, 0)
    if entry.chosen == "sdpa" and need.causal and (need.window is None or span == seq_len) and not need.bias:
        extra = 0  # without a window, a causal mask is a flag of the kernel
    return Estimate(2 * heads * pairs * (size + value_size), _HALF * span * kv_heads * (size + value_size), extra)


def computed_flops(entry: LayerPlan, seq_len: int) -> int:
    """FLOPs that the kernel computes in a layer's forward: `Estimate.flops`, and the masked pairs where it forms the
    weights (``eager``) or reads a dense mask (``sdpa``), since such kernels skip nothing.

    Raises:
        InvalidConfigError: `seq_len` is not positive.
    """
    found = estimate(entry, seq_len)
    need = entry.layer.need
    if not found.extra_bytes:
        return found.flops
    size, value_size = need.head_dim or 0, need.value_dim or need.head_dim or 0
    return 2 * (need.heads or 1) * _cells(entry, seq_len) * (size + value_size)


def _cells(entry: LayerPlan, seq_len: int) -> int:
    """Elements of the score matrix of a head: of each chunk, if the layer attends by chunk."""
    chunk = entry.layer.need.chunk if entry.layer.need.window is None else None
    span = min(seq_len, chunk or seq_len)
    return sum(min(span, seq_len - start) ** 2 for start in range(0, seq_len, span))


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def total(plan: Plan, seq_len: int) -> Estimate:
    """The whole plan: FLOPs and cache summed over the layers, and the largest extra memory of a layer."""
    each = [estimate(entry, seq_len) for entry in plan.layers]
    extra = max((one.extra_bytes for one in each), default=0)
    return Estimate(sum(one.flops for one in each), sum(one.kv_bytes for one in each), extra)
