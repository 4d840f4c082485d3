"""Reasons why a model can't be split over ranks: its class (`axattn.traits.row_forms`), its heads and backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from axattn import backends
from axattn.errors import Reason
from axattn.hf.module_walk import modules_of
from axattn.patches.state import state_of
from axattn.planning.plan import Plan
from axattn.planning.routes import ATTRIBUTE
from axattn.spec import names
from axattn.spec.capability import Need
from axattn.traits import row_forms


def reasons_against(model: torch.nn.Module, ranks: int, strategy: Literal["ulysses", "fetch"]) -> list[Reason]:
    """Every reason why rows of a model can't be split over ranks; empty when they can.

    Args:
        model: a ``PreTrainedModel``.
        ranks: P, which share the heads if `strategy` is ``"ulysses"``.
        strategy: how.
    """
    state = state_of(model)
    if state is None or state.plan is None:
        return [Reason("model", "it does not run on axattn yet", 'axattn.apply(model, "auto")')]
    needs = [entry.layer.need for entry in state.plan.layers]
    running = tuple(state.plan.running.values())
    reasons = row_forms.reasons_against(model, "split" if strategy == "ulysses" else "placed", needs, running)
    reasons += _heads(needs, running, ranks) if strategy == "ulysses" else _stems(state.plan)
    routed = sum(ATTRIBUTE in vars(module) for module in modules_of(model))
    layers = len(needs) or getattr(model.config, "num_hidden_layers", None)
    if isinstance(layers, int) and routed < layers and not reasons:
        reasons.append(Reason("model", f"{layers - routed} of its {layers} layers don't run through axattn"))
    return reasons


def _heads(needs: Sequence[Need], running: Sequence[str | None], ranks: int) -> list[Reason]:
    uneven = sorted({need.heads for need in needs if need.heads is not None and need.heads % ranks})
    reasons = []
    if uneven:
        text = f"{', '.join(map(str, uneven))} heads can't be divided among {ranks} ranks"
        reasons.append(Reason("heads", text, 'strategy="fetch", which does not divide heads'))
    grouped = [name for name in dict.fromkeys(name for name in running if name) if _splits_heads(name)]
    return [*reasons, *(Reason("heads", f"{name} treats the halves of the heads differently") for name in grouped)]


def _splits_heads(name: str) -> bool:
    return name in names.axattn_backends() and name != "auto" and backends.get(name).variant is not None


def _stems(plan: Plan) -> list[Reason]:
    """Why a rank's queries can't attend to keys that others hold."""
    chosen = dict.fromkeys(entry.chosen for entry in plan.layers if not names.is_native(entry.chosen))
    lacking = [name for name in chosen if not backends.get(name).capability_on(plan.environment).stems]
    reasons = [Reason("stems", f"{name} can't attend to keys in several ranges") for name in lacking]
    if any(need.window is not None and not need.causal for need in (entry.layer.need for entry in plan.layers)):
        text = "windows to both sides of a query need the whole document on one rank"
        reasons.append(Reason("window", text, 'strategy="ulysses"'))
    return reasons
