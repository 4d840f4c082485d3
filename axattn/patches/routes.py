"""Patch: the attention names in a model's configs and a `Route` on every attention module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from axattn import names
from axattn.by_path import nested
from axattn.hf.model_internals import CONFIG_NAME
from axattn.hf.registries import require_own_file
from axattn.hf.source_inspection import calls_interface
from axattn.needs import sub_configs
from axattn.patches.patchset import PatchSet
from axattn.plans import Plan
from axattn.routes import ATTRIBUTE, Route, candidates


def copied_configs(model: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> list[Any]:
    """Configs of inner models that are no part of the model's own config: T5's stacks each have a copy of theirs."""
    from transformers import PreTrainedModel

    known = {id(config) for _, config in sub_configs(model.config)}
    found = {id(m.config): m.config for m in modules if isinstance(m, PreTrainedModel) and id(m.config) not in known}
    return list(found.values())


def set_names(
    patches: PatchSet,
    model: torch.nn.Module,
    modules: Iterable[torch.nn.Module],
    plan: Plan,
    *,
    allow_all_kernels: bool = False,
) -> None:
    """Put the plan's names into the model's configs; native ones through Transformers' own checked setter.

    A copied config (see `copied_configs`) follows the outermost one, as in Transformers.
    """
    configs = dict(sub_configs(model.config))
    copies = copied_configs(model, modules)
    for config in (*configs.values(), *copies):
        # the name itself does not change here: this remembers it, before Transformers' setter changes it unseen
        patches.set_attribute(config, CONFIG_NAME, getattr(config, CONFIG_NAME, None))
    native = {p: n for p, n in plan.running.items() if n is not None and names.is_native(n)}
    if any(configs[path]._attn_implementation != name for path, name in native.items()):
        model.set_attn_implementation(  # type: ignore[operator]  # a method of PreTrainedModel
            nested({**{p: c._attn_implementation for p, c in configs.items()}, **native}),
            allow_all_kernels=allow_all_kernels,
        )
    for path, name in plan.running.items():
        if name is not None and not names.is_native(name):
            for config in (configs[path], *(copies if path == "" else ())):
                setattr(config, CONFIG_NAME, name)


def add_routes(patches: PatchSet, model: torch.nn.Module, modules: dict[str, torch.nn.Module], plan: Plan) -> None:
    """Put a `Route` on every attention module whose config runs on a name of ours."""
    path_of = {id(config): path for path, config in sub_configs(model.config)}
    chosen = {(entry.layer.path, entry.layer.index): entry.chosen for entry in plan.layers}
    for name, module in modules.items():
        cls: Any = type(module)
        if not calls_interface(cls):
            continue
        config: Any = getattr(module, "config", None)
        path = path_of.get(id(config), "")
        running = plan.running.get(path)
        if running is None or names.is_native(running):
            continue
        if (
            getattr(config, "_attn_implementation", running) != running
        ):  # a tower that hard-codes its own: not ours, so not in status
            continue
        require_own_file(running, name, cls)
        order = plan.orders.get(path) or candidates(running, plan.on_unsupported, plan.environment)
        planned = chosen.get((path, getattr(module, "layer_idx", None) or 0), order[0])
        patches.set_attribute(module, ATTRIBUTE, Route(running, name, order, planned, options=plan.options))
