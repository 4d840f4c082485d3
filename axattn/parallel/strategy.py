"""How rows are split over ranks: by exchanging heads (Ulysses) or by fetching keys, whichever sends less."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple, get_args

from axattn.documents.placement import Placement
from axattn.errors import InvalidInputError
from axattn.parallel.fetch_plan import Rule, fetched
from axattn.parallel.ulysses import repeats
from axattn.spec.capability import Need

Strategy = Literal["auto", "ulysses", "fetch"]


def require_strategy(strategy: object) -> None:
    """Raise for an unknown strategy.

    Raises:
        InvalidInputError: it is none of `Strategy`.
    """
    if strategy not in get_args(Strategy):
        shown = ", ".join(f'"{name}"' for name in get_args(Strategy))
        raise InvalidInputError(f"strategy={strategy!r} is not one of {shown}")


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


def layer_sizes(needs: Iterable[Need]) -> list[LayerSizes] | None:
    """The sizes of attention layers; None if one is unknown."""
    found = []
    for need in needs:
        if need.heads is None or need.head_dim is None:
            return None
        sizes = need.heads, need.kv_heads or need.heads, need.head_dim, need.value_dim or need.head_dim
        found.append(LayerSizes(*sizes, Rule(need.causal, need.window, need.chunk)))
    return found


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
