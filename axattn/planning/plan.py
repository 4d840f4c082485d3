"""`Plan`: the backend of each layer, and why not a faster one. Value types, made by `axattn.planning.planner`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from axattn.errors import Reason
from axattn.machine.environment import Environment
from axattn.planning.routes import OnUnsupported
from axattn.spec.names import TRUSTED_PUBLISHERS
from axattn.traits.layer_needs import LayerNeed


@dataclass(frozen=True, slots=True)
class Policy:
    """What a user allows.

    Attributes:
        on_unsupported: ``"raise"``, or ``"route"`` to the next exact kernel; ``auto`` always routes.
        allow_all_kernels: hub kernels of any publisher may run.
        trusted: hub publishers whose kernels may run.
        upgrade_flash: ``flash_attention_2`` becomes ``flash_attention_4`` if the machine and every layer allow it,
            forward and backward.
        options: ``kernel_options`` as given.
    """

    on_unsupported: OnUnsupported = "raise"
    allow_all_kernels: bool = False
    upgrade_flash: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    trusted: frozenset[str] = TRUSTED_PUBLISHERS


@dataclass(frozen=True, slots=True)
class Rejected:
    """A kernel that a layer does not get, with every reason."""

    backend: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The plan of one layer.

    Attributes:
        layer: what it needs.
        asked: the name asked for.
        chosen: the backend it gets.
        rejected: faster kernels, and the one asked for, that it does not get.
    """

    layer: LayerNeed
    asked: str
    chosen: str
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a model.

    Attributes:
        model: name of the model, for messages.
        environment: the machine it was made for.
        asked: name by config path; None leaves Transformers' default there.
        running: the name that Transformers gets, by config path.
        layers: a `LayerPlan` per attention layer.
        orders: the backends that the layers of a config path may use, in order; empty for a native name.
        on_unsupported: the policy.
        unknown: config paths that are checked call by call only.
        notes: sentences for the user.
        options: ``kernel_options`` as given.
        loads: the hub kernel, with its revision, that Transformers loads, by config path.
        sources: sentences on whose kernels the chosen backends call.
    """

    model: str
    environment: Environment
    asked: Mapping[str, str | None]
    running: Mapping[str, str | None]
    layers: tuple[LayerPlan, ...]
    on_unsupported: OnUnsupported
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    loads: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def groups(self) -> list[tuple[list[LayerPlan], LayerPlan]]:
        """Layers that differ only in their index, in order: (members, the first of them)."""
        found: dict[Any, list[LayerPlan]] = {}
        for entry in self.layers:
            key = (entry.layer.path, entry.layer.kind, entry.layer.need, entry.asked, entry.chosen)
            found.setdefault(key, []).append(entry)
        return [(members, members[0]) for members in found.values()]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "model": self.model,
            "environment": self.environment.to_dict(),
            "asked": dict(self.asked),
            "running": dict(self.running),
            "on_unsupported": self.on_unsupported,
            "layers": [
                {
                    "layer": entry.layer.name,
                    "kind": entry.layer.kind,
                    "asked": entry.asked,
                    "chosen": entry.chosen,
                    "rejected": {r.backend: [reason.text for reason in r.reasons] for r in entry.rejected},
                }
                for entry in self.layers
            ],
            "unknown": list(self.unknown),
            "notes": list(self.notes),
            "options": dict(self.options),
            "hub": dict(self.loads),
            "sources": list(self.sources),
        }

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.environment.describe()}"]
        for members, first in self.groups():
            lines.append(f"  {_range(members)} {first.layer.kind}: {first.asked} → {first.chosen}")
            for rejected in first.rejected:
                lines.append(f"      not {rejected.backend}: {'; '.join(r.text for r in rejected.reasons)}")
        lines += [f"  {path or 'model'}: checked call by call" for path in self.unknown]
        return "\n".join([*lines, *(f"  {text}" for text in (*self.notes, *self.sources))])


def _range(members: list[LayerPlan]) -> str:
    numbers = [entry.layer.index for entry in members]
    path = f"{members[0].layer.path} " if members[0].layer.path else ""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{path}layers {numbers[0]}-{numbers[-1]}"
    return f"{path}layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
