"""Reasons why a model can't be split over ranks, from its config, modules and the source of its forward."""

from __future__ import annotations

from typing import Any

import torch

from axattn import backends
from axattn.errors import Reason
from axattn.hf.source_inspection import code_of, signature_of
from axattn.hf.trial import shared_skeletons
from axattn.patches.state import state_of
from axattn.planning.routes import ATTRIBUTE
from axattn.spec import names
from axattn.traits import position_ids
from axattn.traits.dynamic_rope import by_length
from axattn.traits.layer_needs import sub_configs
from axattn.traits.losses import contradictions, takes_keywords
from axattn.traits.pooling import one_a_row
from axattn.traits.token_mixers import mixers, text_model


@shared_skeletons()
def reasons_against(model: torch.nn.Module, ranks: int) -> list[Reason]:
    """Every reason why rows of a model can't be split over ranks; empty when they can.

    Args:
        model: a ``PreTrainedModel``.
        ranks: P.
    """
    config: Any = model.config
    reasons: list[Reason] = []
    state = state_of(model)
    if state is None or state.plan is None:
        return [Reason("model", "it does not run on axattn yet", 'axattn.apply(model, "auto")')]
    native = sorted({n for n in state.plan.running.values() if n is not None and names.is_native(n)})
    if native or not all(state.plan.running.values()):
        shown = ", ".join(map(str, native)) or "Transformers' default"
        reasons.append(Reason("model", f'it runs on {shown}, which Transformers serves (use "auto" or "varlen")'))
    if getattr(config, "is_encoder_decoder", False):
        reasons.append(Reason("model", "it is an encoder-decoder"))
    if len(sub_configs(config)) > 1:
        reasons.append(Reason("model", "it is made of several models (images, audio)"))
    reasons += [*_layer_reasons(model, config), *one_a_row(model)]
    needs = [entry.layer.need for entry in state.plan.layers]
    uneven = sorted({need.heads for need in needs if need.heads is not None and need.heads % ranks})
    if uneven:
        reasons.append(Reason("heads", f"{', '.join(map(str, uneven))} heads can't be divided among {ranks} ranks"))
    if any(need.bias for need in needs):
        reasons.append(Reason("bias", "its position bias is computed from the tokens of one rank"))
    if any(need.sparse for need in needs):
        reasons.append(Reason("sparse", "it selects keys among the tokens of one rank"))
    grouped = [name for name in dict.fromkeys(n for n in state.plan.running.values() if n) if _splits_heads(name)]
    reasons += [Reason("heads", f"{name} treats the halves of the heads differently") for name in grouped]
    dynamic = by_length(config)
    if dynamic:
        text = f"its rotary embedding ({', '.join(dynamic)}) depends on the longest position on a rank"
        reasons.append(Reason("model", text))
    if getattr(config, "output_router_logits", False):
        reasons.append(Reason("model", "output_router_logits: the load-balancing loss would cover one rank's tokens"))
    reasons += _forward_reasons(model)
    return reasons


def _splits_heads(name: str) -> bool:
    return name in names.axattn_backends() and name != "auto" and not backends.get(name).heads_alike


def _layer_reasons(model: torch.nn.Module, config: Any) -> list[Reason]:
    """Layers that read other tokens of a row outside of an attention module that runs through axattn."""
    reasons = [*mixers(model), *position_ids.counters(model), *position_ids.contradictions(text_model(model))]
    routed = sum(ATTRIBUTE in vars(module) for module in model.modules())
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and routed < layers and not reasons:
        reasons.append(Reason("model", f"{layers - routed} of its {layers} layers don't run through axattn"))
    return reasons


def _forward_reasons(model: torch.nn.Module) -> list[Reason]:
    """Reasons from the signature and source of a model's forward."""
    parameters, cls = signature_of(model).parameters, code_of(model)
    if "position_ids" not in parameters:
        return [Reason("position_ids", f"{cls.__name__} takes no position_ids")]
    if "labels" not in parameters:
        return []
    reasons = contradictions(model)
    if reasons or takes_keywords(model):
        return reasons
    return [Reason("model", f"{cls.__name__} computes its own loss, as a mean over one rank's tokens")]
