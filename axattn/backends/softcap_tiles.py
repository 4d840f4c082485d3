"""Exact attention under a softcap by torch's operators, tile by tile, with its logsumexp: no L x L weights in memory.

Rows attend to themselves. Weights are computed again in backward, as in FlashAttention (Dao et al. 2022,
arXiv:2205.14135). Capped logits are bounded, so their exponentials are summed without subtracting a maximum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from axattn.masks.dense_rule import dense_rule

MAX_SOFTCAP = 64.0
"""exp(-64) = 2e-28 and exp(64) = 6e27: in float32 the sum over any number of keys neither vanishes nor overflows."""
QUERIES = 64
"""Queries of a tile, at most."""
WEIGHTS = 1 << 19
"""Weights of a tile, at most (one KV head at least): 2 MB in float32, so that each operator finds them in a cache."""
SHORTEST = 256
FEWEST = {"causal": 1 << 20, "both ways": 1 << 23}
"""From this length on, and from this number of L x L weights in all rows and heads, tiles beat the model's function:
measured on a CPU, forward and backward (benchmarks/NOTES.md)."""


class Rule(NamedTuple):
    """The logits, and which keys a query attends to: at least one.

    Attributes:
        scale: factor on the logits.
        softcap: logits are ``softcap * tanh(logits / softcap)``; above 0, at most `MAX_SOFTCAP`.
        causal: no later key.
        window: visible keys to the left, including the query's own (and to the right, if not causal); None for all.
        mask: bool ``[n, 1, L, L]`` (True: attend), the whole rule if there is padding beside `causal` and `window`, or
            None. Queries of padding, whose output nobody reads, may see other keys.
    """

    scale: float
    softcap: float
    causal: bool
    window: int | None
    mask: torch.Tensor | None = None


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Attention, computed in float32 (float64 for such inputs). Can be differentiated any number of times; from the
    second derivative on with L x L weights.

    Args:
        query: ``[n, H, L, D]``.
        key: ``[n, Hkv, L, D]``.
        value: ``[n, Hkv, L, Dv]``, all three of one dtype.
        rule: the logits, and which keys a query attends to.

    Returns:
        ``[n, L, H, Dv]`` in the dtype of the inputs.
    """
    out: torch.Tensor = _Attention.apply(query, key, value, rule)  # type: ignore[no-untyped-call]  # torch's
    return out.transpose(1, 2).contiguous()


def pays(query: torch.Tensor, causal: bool) -> bool:
    """Whether `attention` beats operators on whole L x L weights, for a query ``[n, H, L, D]``.

    Measured on CPUs only, so never on another device.
    """
    rows, heads, length, _ = query.shape
    weights = rows * heads * length**2
    return query.device.type == "cpu" and length >= SHORTEST and weights >= FEWEST["causal" if causal else "both ways"]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            out, lse = forward(query, key, value, rule)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph=True
                return (*_differentiable_backward(grad, query, key, value, ctx.rule), None)
            return (*backward(grad, query, key, value, out, lse, ctx.rule), None)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[n, H, L, Dv]`` and logsumexp ``[n * Hkv, H / Hkv, L, 1]``, float32 or float64."""
    kv_heads = key.shape[1]
    q, k, v = (_by_kv_head(x, kv_heads) for x in (query * (rule.scale / rule.softcap), key, value))
    out, lse = q.new_empty(*q.shape[:3], value.shape[-1], dtype=query.dtype), q.new_empty(*q.shape[:3], 1)
    for tile in _tiles(q, rule):
        weights = torch.bmm(tile.queries(q), tile.keys(k).mT).tanh_().mul_(rule.softcap).exp_()
        _hide(weights, tile, rule, kv_heads)
        total = weights.sum(-1, keepdim=True)
        tile.put(out, torch.bmm(weights, tile.keys(v)).div_(total))
        tile.put(lse, total.log_())
    return out.view(*query.shape[:3], -1), lse


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rule: Rule,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `forward` to query, key and value."""
    kv_heads = key.shape[1]
    q, k, v, g, o = (_by_kv_head(x, kv_heads) for x in (query, key, value, grad, out))
    delta = (g * o).sum(-1, keepdim=True)  # the sum over keys of weight times its gradient
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in _tiles(q, rule):
        queries, keys, grads = tile.queries(q), tile.keys(k), tile.queries(g)
        tanh = torch.bmm(queries * (rule.scale / rule.softcap), keys.mT).tanh_()
        weights = torch.add(-tile.queries(lse), tanh, alpha=rule.softcap).exp_()
        _hide(weights, tile, rule, kv_heads)
        tile.keys(dv).baddbmm_(weights.mT, grads)
        of_logits = torch.bmm(grads, tile.keys(v).mT).sub_(tile.queries(delta)).mul_(weights)
        of_logits.addcmul_(of_logits, tanh.square_(), value=-1)
        tile.put(dq, torch.bmm(of_logits, keys).mul_(rule.scale))
        tile.keys(dk).baddbmm_(of_logits.mT, queries, alpha=rule.scale)
    return tuple(d.view(x.shape).to(x.dtype) for d, x in ((dq, query), (dk, key), (dv, value)))


class _Tile(NamedTuple):
    """Queries ``[start, stop)`` and the keys ``[low, high)`` that they may see, of KV heads ``[head, end)`` of all
    rows."""

    head: int
    end: int
    start: int
    stop: int
    low: int
    high: int

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """``[n * Hkv, G, L, D]`` as ``[heads, G * queries, D]``: the heads of a group are queries of one KV head."""
        return x[self.head : self.end, :, self.start : self.stop].flatten(1, 2)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """``[n * Hkv, 1, L, D]`` as ``[heads, keys, D]``, a view."""
        return x[self.head : self.end, 0, self.low : self.high]

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """The inverse of `queries`."""
        place = whole[self.head : self.end, :, self.start : self.stop]
        place.copy_(part.view(place.shape))


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[n, H, L, D]`` as ``[n * Hkv, H / Hkv, L, D]``, float32 or float64."""
    n, heads, length, dim = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.reshape(n * kv_heads, heads // kv_heads, length, dim)


def _tiles(q: torch.Tensor, rule: Rule) -> Iterator[_Tile]:
    heads, group, length, _ = q.shape
    step = max(1, WEIGHTS // max(1, group * min(QUERIES, length) * length))
    for head in range(0, heads, step):
        for start in range(0, length, QUERIES):
            stop, low = min(start + QUERIES, length), 0
            high = stop if rule.causal else length
            if rule.window is not None:
                low, high = max(0, start - rule.window + 1), min(high, stop + rule.window - 1)
            yield _Tile(head, min(head + step, heads), start, stop, low, high)


def _hide(weights: torch.Tensor, tile: _Tile, rule: Rule, kv_heads: int) -> None:
    """Zero the weights ``[heads, G * queries, keys]`` of keys that a query does not attend to."""
    head, end, start, stop, low, high = tile
    if rule.mask is not None:
        rows = torch.arange(head, end, device=weights.device) // kv_heads
        seen = rule.mask[:, :, start:stop, low:high].index_select(0, rows)
    elif rule.causal or rule.window is not None:
        low = low if rule.window is not None else start  # causal: every query sees the keys before the tile
        options: dict[str, Any] = {"causal": rule.causal, "window": rule.window, "offset": start - low}
        seen = dense_rule(stop - start, high - low, **options, device=weights.device)
    else:
        return
    by_head = weights.view(end - head, -1, stop - start, weights.shape[-1])
    by_head[..., low - high :].masked_fill_(~seen, 0.0)


def _differentiable_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor | None, ...]:
    """`backward` by operators that autograd knows, with L x L weights."""
    q, k, v = (x.view_as(x) for x in (query, key, value))  # one of the inputs may be computed from another
    wide, group, length = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1], q.shape[2]
    repeated_k, repeated_v = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    logits = rule.softcap * torch.tanh(q.to(wide) @ repeated_k.mT * (rule.scale / rule.softcap))
    seen = dense_rule(length, length, causal=rule.causal, window=rule.window, device=q.device)
    seen = seen if rule.mask is None else rule.mask
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    out = (weights @ repeated_v).to(q.dtype)
    found = iter(torch.autograd.grad(out, [x for x in (q, k, v) if x.requires_grad], grad, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in (q, k, v))
