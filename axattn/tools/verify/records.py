"""`Check` and `Verification`: value types for comparisons and their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["ok", "refused", "wrong"]


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison.

    Attributes:
        scenario: its name.
        outcome: ``refused`` means that axattn raised; the reason is in `detail`.
        error: largest relative error of norms against the exact result; None if nothing was compared.
        budget: the largest error that counts as right.
        detail: where the error is, or the reason.
    """

    scenario: str
    outcome: Outcome
    error: float | None = None
    budget: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """All comparisons of one model on one name.

    Attributes:
        model: class name.
        asked: the name.
        kernels: the kernels that ran, with the number of calls over all layers.
        layers: number of layers kept.
        weights: ``"loaded"``, ``"random"``, or ``"yours"`` (a model was passed).
        dtype: of the model.
        device: where it ran.
        checks: in run order.
    """

    model: str
    asked: str
    kernels: Mapping[str, int]
    layers: int
    weights: str
    dtype: str
    device: str
    checks: tuple[Check, ...]

    @property
    def verified(self) -> bool:
        """Whether any scenario was compared (not all were refused)."""
        return any(check.outcome != "refused" for check in self.checks)

    @property
    def right(self) -> bool:
        """Whether something was compared and nothing is wrong."""
        return self.verified and all(check.outcome != "wrong" for check in self.checks)

    @property
    def verdict(self) -> str:
        """The result as one sentence."""
        if not self.verified:
            return "Nothing was verified: every scenario was refused."
        if not self.right:
            return "Something is wrong."
        refused = sum(check.outcome == "refused" for check in self.checks)
        return "Nothing is wrong." + (f" {refused} of {len(self.checks)} scenarios were refused." if refused else "")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {**asdict(self), "kernels": dict(self.kernels), "right": self.right, "verdict": self.verdict}
