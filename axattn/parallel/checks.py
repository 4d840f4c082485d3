"""Reasons why a model can't be split over ranks: its class (`axattn.traits.row_forms`), its heads and backends."""

from __future__ import annotations

import torch

from axattn import backends
from axattn.errors import Reason
from axattn.hf.module_walk import modules_of
from axattn.patches.state import state_of
from axattn.planning.routes import ATTRIBUTE
from axattn.spec import names
from axattn.traits import row_forms


def reasons_against(model: torch.nn.Module, ranks: int) -> list[Reason]:
    """Every reason why rows of a model can't be split over ranks; empty when they can.

    Args:
        model: a ``PreTrainedModel``.
        ranks: P.
    """
    state = state_of(model)
    if state is None or state.plan is None:
        return [Reason("model", "it does not run on axattn yet", 'axattn.apply(model, "auto")')]
    needs = [entry.layer.need for entry in state.plan.layers]
    running = tuple(state.plan.running.values())
    reasons = row_forms.reasons_against(model, "split", needs, running)
    uneven = sorted({need.heads for need in needs if need.heads is not None and need.heads % ranks})
    if uneven:
        reasons.append(Reason("heads", f"{', '.join(map(str, uneven))} heads can't be divided among {ranks} ranks"))
    grouped = [name for name in dict.fromkeys(name for name in running if name) if _splits_heads(name)]
    reasons += [Reason("heads", f"{name} treats the halves of the heads differently") for name in grouped]
    routed = sum(ATTRIBUTE in vars(module) for module in modules_of(model))
    layers = getattr(model.config, "num_hidden_layers", None)
    if isinstance(layers, int) and routed < layers and not reasons:
        reasons.append(Reason("model", f"{layers - routed} of its {layers} layers don't run through axattn"))
    return reasons


def _splits_heads(name: str) -> bool:
    return name in names.axattn_backends() and name != "auto" and backends.get(name).variant is not None
