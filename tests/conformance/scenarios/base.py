"""What a scenario is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.conformance.cases import Case, Result
from tests.conformance.families import Family

LENGTHS = (7, 11, 3)
EXACT = 1e-5
DECODERS = frozenset({"decoder", "vision"})
SELF = DECODERS | {"encoder"}
ALL = SELF | {"encoder-decoder"}
PROJECTIONS = ("q_", "k_", "v_", "o_proj", "qkv", "kv_", "out_proj", "Wqkv", "Wo", "query", "key", "value", "embed")


@dataclass(frozen=True)
class Scenario:
    """One row of the matrix.

    Attributes:
        name: as in the table.
        run: ``Case`` → (expected, found), each a dict of tensors; runs the candidate only if `expected` could be made.
        kinds: families it applies to.
        applies: why it does not apply to a family, "" when it does.
        tolerance: largest error (see `cells.error`) that counts as equal.
    """

    name: str
    run: Callable[[Case], tuple[Result, Callable[[], Result]]]
    kinds: frozenset[str]
    applies: Callable[[Family], str] = lambda family: ""
    tolerance: float = EXACT


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, kinds: frozenset[str], **options: Any) -> Callable[[Any], Any]:
    """Register a scenario."""

    def add(function: Any) -> Any:
        SCENARIOS[name] = Scenario(name, function, kinds, **options)
        return function

    return add
