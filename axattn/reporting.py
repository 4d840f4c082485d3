"""`Status`: the kernel that each layer of a model runs on now, and how many calls it has served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from axattn.hf.hub_kernels import loaded_revision
from axattn.hf.registries import axattn_functions, foreign, name_of
from axattn.patches.state import state_of
from axattn.planning.routes import ATTRIBUTE, Route, route_in_passing
from axattn.traits.attention_configs import copies
from axattn.traits.layer_needs import sub_configs


@dataclass(frozen=True, slots=True)
class LayerStatus:
    """One attention module.

    Attributes:
        layer: its name in the model.
        asked: the requested name.
        planned: the name that the plan chose.
        served: calls served, by the kernel that ran. A kernel passes calls that it can't serve to another: `varlen`
            passes dropout and dense S x S masks (non-contiguous padding, a user's mask) to `sdpa`; `sage` decodes on
            `varlen`.
        compiled: the kernel in its compiled graph (its calls are not counted), None without ``torch.compile``.
            Non-contiguous padding is found when the graph runs: such calls go to `sdpa` and are not shown here.
    """

    layer: str
    asked: str
    planned: str
    served: Mapping[str, int]
    compiled: str | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """What runs in a model.

    Attributes:
        asked: requested name, by config path.
        running: current name in the config, by config path.
        layers: attention modules that run through axattn. In a model that axattn did not load they appear after their
            first call.
        patches: number of changes that `axattn.restore` would undo.
        held: the foreign function that is now registered under a running axattn backend's name, by config path;
            `layers` then shows the calls that axattn served before.
        apart: by attention module, the name in the module's own config where it differs from its model's. A forward in
            which the module would misread its masks is refused.
        hub: the hub kernel that Transformers runs, with its revision and the loaded commit, by config path.
    """

    asked: Mapping[str, str | None]
    running: Mapping[str, str | None]
    layers: tuple[LayerStatus, ...]
    patches: int
    held: Mapping[str, str] = field(default_factory=dict)
    apart: Mapping[str, str | None] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for path, running in self.running.items():
            asked = self.asked.get(path)
            shown = f"{asked} → {running}" if asked not in (None, running) else str(running)
            shown += f", replaced by another package: {self.held[path]}" if path in self.held else ""
            shown += f", the hub kernel {self.hub[path]}" if path in self.hub else ""
            lines.append(f"{path or 'model'}: {shown}")
        for layer in self.layers:
            counts = [f"{name} {count}" for name, count in layer.served.items()]
            counts += [f"{layer.compiled} in a compiled graph"] if layer.compiled else []
            served = ", ".join(counts) or "no calls yet"
            lines.append(f"  {layer.layer}: planned {layer.planned}; served {served}")
        lines += [f"  {layer}: runs {name}, from its own config" for layer, name in self.apart.items()]
        lines.append(f"{self.patches} patches active")
        return "\n".join(lines)


def read_status(model: torch.nn.Module) -> Status:
    """The status of a Transformers model."""
    state = state_of(model)
    running = {path: config._attn_implementation for path, config in sub_configs(model.config)}
    routes: list[tuple[str, Route]] = []
    for name, module in model.named_modules():
        planned, passing = vars(module).get(ATTRIBUTE), route_in_passing(module)
        if planned is not None:
            routes.append((name, planned))
        elif passing is not None:
            routes.append((name, passing))
    layers = tuple(LayerStatus(name, r.asked, r.planned, dict(r.served), r.compiled) for name, r in routes)
    asked = dict(state.plan.asked) if state is not None and state.plan is not None else {}
    held = {
        path: "; ".join(r.text for r in foreign(name)) for path, name in running.items() if name in axattn_functions()
    }
    held = {path: text for path, text in held.items() if text}
    apart = {
        copy.layer: one
        for copy in copies(model)
        if copy.attends and (one := name_of(copy.config)) != running[copy.path]
    }
    loads = state.plan.loads if state is not None and state.plan is not None else {}
    hub = {path: _shown(kernel) for path, kernel in loads.items()}
    return Status(asked, running, layers, 0 if state is None else len(state.patches), held, apart, hub)


def _shown(kernel: str) -> str:
    """A hub kernel with the commit loaded in this process: ``org/name@v4 (commit 0510be1e)``."""
    commit = loaded_revision(kernel.split("@", maxsplit=1)[0])
    return kernel if not commit or kernel.endswith(commit) else f"{kernel} (commit {commit[:8]})"
