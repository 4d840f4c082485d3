"""The kernels that a layer does not get, with the reason and what each would cost. Computed from a plan. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from axattn.machine.environment import Environment
from axattn.planning.estimates import computed_flops, estimate
from axattn.planning.plan import LayerPlan
from axattn.planning.planner import backend_of
from axattn.planning.ranking import by_need, ranking
from axattn.spec.capability import missing


@dataclass(frozen=True, slots=True)
class Alternative:
    """A kernel that a layer does not get.

    Attributes:
        backend: its name.
        serves: whether it could serve the layer here; then `auto` prefers the chosen kernel.
        reasons: why the layer does not get it.
        flops: of its forward on one row of one document, masked pairs that it computes included.
        extra_bytes: memory of its mask or weights (`axattn.planning.estimates.Estimate`).
    """

    backend: str
    serves: bool
    reasons: tuple[str, ...]
    flops: int
    extra_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {**asdict(self), "reasons": list(self.reasons)}


def alternatives(entry: LayerPlan, environment: Environment, seq_len: int) -> list[Alternative]:
    """First the kernels that can't serve a layer, then, for `auto`, the kernels after the chosen one that could.

    Raises:
        InvalidConfigError: `seq_len` is not positive.
    """
    found = [
        _alternative(entry, one.backend, tuple(reason.text for reason in one.reasons), seq_len, serves=False)
        for one in entry.rejected
    ]
    sources = {rank.name: rank.source for rank in ranking(environment)}
    need = replace(entry.layer.need, device=environment.torch_device)
    order = by_need(sources, need)
    if entry.asked != "auto" or entry.chosen not in order:
        return found
    for name in order[order.index(entry.chosen) + 1 :]:
        backend = backend_of(name)
        if not backend.probe(environment) and not missing(need, backend.called_capability_on(environment), name):
            found.append(_alternative(entry, name, (sources[name],), seq_len, serves=True))
    return found


def _alternative(entry: LayerPlan, name: str, reasons: tuple[str, ...], seq_len: int, *, serves: bool) -> Alternative:
    other = replace(entry, chosen=name)
    return Alternative(name, serves, reasons, computed_flops(other, seq_len), estimate(other, seq_len).extra_bytes)
