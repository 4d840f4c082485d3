"""Copies of a patched module (``copy.deepcopy`` of a layer) carry axattn's changes: `undo` removes them there too."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from axattn.hf.torch_internals import remove_hooks
from axattn.patches.forward_wrapper import ForwardWrapper
from axattn.patches.state import ATTRIBUTE, State
from axattn.traits.attention_configs import copies, paths_of
from axattn.traits.layer_needs import sub_configs


def undo(model: Any, state: State) -> None:
    """Undo every change to a model, also on configs and modules that were copied since."""
    copied_configs: dict[int, list[object]] = {}
    copied = copies(model)
    path_of, known = paths_of(model, copied), {id(target) for target in state.patches.targets()}
    read = [*(copy.config for copy in copied), *(config for _, config in sub_configs(model.config))]
    for config in {id(config): config for config in read if id(config) not in known}.values():
        original = state.configs.get(path_of[id(config)])
        if original is not None:
            copied_configs.setdefault(id(original), []).append(config)
    state.patches.undo(copied_configs)
    for module in _copied_modules(model):
        remove_hooks(module, _is_axattns)
        for name, value in list(vars(module).items()):
            if name.startswith("_axattn") or (name == "_replicate_for_data_parallel" and _is_axattns(value)):
                delattr(module, name)
            elif name == "forward" and isinstance(value, ForwardWrapper):
                delattr(module, name)
                if (own := value.innermost) is not None:
                    module.forward = own


def _copied_modules(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A module and its submodules, except models with their own `State`."""
    yield module
    for child in module.children():
        if ATTRIBUTE not in vars(child):
            yield from _copied_modules(child)


def _is_axattns(function: Any) -> bool:
    """Whether a hook or a replaced method is axattn's."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", function)
    module = getattr(owner, "__module__", None) or type(owner).__module__
    return str(module).partition(".")[0] == "axattn"
