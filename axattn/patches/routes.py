"""Patch: the attention names in a model's configs and a `Route` on every attention module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from axattn.hf.model_internals import CONFIG_NAME
from axattn.hf.registries import require_own_file
from axattn.patches.patchset import PatchSet
from axattn.planning.plan import Plan
from axattn.planning.routes import ATTRIBUTE, Route, candidates
from axattn.spec import names
from axattn.spec.sub_config_names import nested
from axattn.traits.attention_configs import Copy, is_attention
from axattn.traits.layer_needs import sub_configs


def set_names(
    patches: PatchSet,
    model: torch.nn.Module,
    copied: Iterable[Copy],
    plan: Plan,
    *,
    allow_all_kernels: bool = False,
) -> None:
    """Write the plan's names into the model's configs; native ones through Transformers' own checked setter.

    Each copy of a config (`axattn.traits.attention_configs.copies`) gets the name of its original.
    """
    configs = dict(sub_configs(model.config))
    copies = {id(copy.config): copy for copy in copied}
    for config in (*configs.values(), *(copy.config for copy in copies.values())):
        # does not change the name: it records it for undo, before Transformers' setter changes it
        patches.set_attribute(config, CONFIG_NAME, getattr(config, CONFIG_NAME, None))
    native = {p: n for p, n in plan.running.items() if n is not None and names.is_native(n)}
    if any(configs[path]._attn_implementation != name for path, name in native.items()):
        model.set_attn_implementation(  # type: ignore[operator]  # a method of PreTrainedModel
            nested({**{p: c._attn_implementation for p, c in configs.items()}, **native}),
            allow_all_kernels=allow_all_kernels,
        )
    for path, name in plan.running.items():
        if name is not None and not names.is_native(name):
            setattr(configs[path], CONFIG_NAME, name)
    for copy in copies.values():
        setattr(copy.config, CONFIG_NAME, getattr(configs[copy.path], CONFIG_NAME))


def add_routes(patches: PatchSet, modules: dict[str, torch.nn.Module], path_of: Mapping[int, str], plan: Plan) -> None:
    """Put a `Route` on every attention module whose config runs on an axattn backend.

    Args:
        patches: records the changes.
        modules: every module of the model, by name.
        path_of: result of `axattn.traits.attention_configs.paths_of`.
        plan: plan of the model.
    """
    chosen = {(entry.layer.path, entry.layer.index): entry.chosen for entry in plan.layers}
    for name, module in modules.items():
        if not is_attention(module):
            continue
        config: Any = getattr(module, "config", None)
        path = path_of.get(id(config), "")
        running = plan.running.get(path)
        if running is None or names.is_native(running):
            continue
        require_own_file(running, name, type(module))
        order = plan.orders.get(path) or candidates(running, plan.on_unsupported, plan.environment)
        planned = chosen.get((path, getattr(module, "layer_idx", None) or 0), order[0])
        patches.set_attribute(module, ATTRIBUTE, Route(running, name, order, planned, options=plan.options))
