"""The state that axattn stores on a patched model (plan, patches), and how to find it under wrappers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from axattn.errors import InvalidInputError
from axattn.hf.module_walk import modules_of
from axattn.patches.patchset import PatchSet
from axattn.planning.plan import Plan
from axattn.traits.layer_needs import sub_configs

ATTRIBUTE = "_axattn_state"


@dataclass(eq=False)
class State:
    """Everything axattn did to one model.

    Attributes:
        plan: the model's plan; None if the model was only prepared for training.
        patches: what `axattn.restore` undoes.
        value: the names asked for, to apply them again after `axattn.using`.
        allow_all_kernels: as passed by the user.
        unpad: as passed by the user.
        share_prefixes: as passed by the user.
        later: further changes to the model (`prepare_for_training`, `sequence_parallel`), which `apply` and `using`
            repeat after a new plan. Picklable and copyable like the model.
        configs: the model's configs when it was changed, by path.
    """

    plan: Plan | None
    patches: PatchSet
    value: Any = None
    allow_all_kernels: bool = False
    unpad: bool = False
    share_prefixes: bool = False
    later: list[Callable[[torch.nn.Module], object]] = field(default_factory=list)
    configs: dict[str, Any] = field(default_factory=dict)


def transformers_model(model: torch.nn.Module) -> torch.nn.Module:
    """The outermost ``PreTrainedModel`` inside `model` (PEFT, DDP and compile wrap it).

    Raises:
        InvalidInputError: there is none, or `model` is not a module.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, torch.nn.Module):
        shown = repr(model) if isinstance(model, str | type | None) else f"a {type(model).__name__}"
        name = repr(model) if isinstance(model, str) else '"org/model"'
        advice = f'Load it first: axattn.from_pretrained({name}, attn_implementation="auto").'
        raise InvalidInputError(f"{shown} is not a model that is loaded", advice=advice)

    if isinstance(model, PreTrainedModel):
        return cast(torch.nn.Module, model)
    found = next((inner for inner in modules_of(model) if isinstance(inner, PreTrainedModel)), None)
    if found is None:
        text = f"{type(model).__name__} holds no Transformers model"
        raise InvalidInputError(text, advice="axattn works on Transformers models, also inside wrappers.")
    return cast(torch.nn.Module, found)


def state_of(model: torch.nn.Module) -> State | None:
    """The state of a model, None if axattn has not changed it."""
    state: State | None = vars(transformers_model(model)).get(ATTRIBUTE)
    return state


def ensure_state(model: torch.nn.Module) -> State:
    """The state of a model, created if there is none."""
    base = transformers_model(model)
    state = state_of(base)
    if state is None:
        patches = PatchSet()
        state = State(None, patches, configs=dict(sub_configs(cast(Any, base).config)))
        patches.set_attribute(base, ATTRIBUTE, state)
    return state
