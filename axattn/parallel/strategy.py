"""How rows are split over ranks: by exchanging heads (Ulysses) or by fetching keys, whichever sends less."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from axattn.documents.placement import Placement
from axattn.parallel.fetch_plan import Rule, fetched
from axattn.parallel.ulysses import repeats

Strategy = Literal["auto", "ulysses", "fetch"]
STRATEGIES = ("auto", "ulysses", "fetch")


class LayerSizes(NamedTuple):
    """What decides the traffic of an attention layer.

    Attributes:
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        value_dim: Dv.
        rule: which tokens a query attends to.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rule: Rule = Rule()

    @property
    def kv_values(self) -> int:
        """Values in the keys and values of a token."""
        return self.kv_heads * (self.head_dim + self.value_dim)


def ulysses_values(layers: Iterable[LayerSizes], tokens: int, ranks: int) -> int:
    """Values that a rank sends in one forward to exchange heads: ``(P - 1) / P`` of the queries, keys, values and
    outputs of its `tokens`, KV heads repeated as needed. H of each layer is a multiple of P."""
    values = 0
    for layer in layers:
        repeated = repeats(layer.heads, layer.kv_heads, ranks) * layer.kv_values
        values += layer.heads * (layer.head_dim + layer.value_dim) + repeated
    return values * tokens * (ranks - 1) // ranks


def fetch_values(layers: Collection[LayerSizes], placement: Placement) -> int:
    """Values that the busiest rank receives in one forward to fetch keys."""
    keys = {rule: max(map(len, fetched(placement, rule))) for rule in {layer.rule for layer in layers}}
    return sum(keys[layer.rule] * layer.kv_values for layer in layers)
