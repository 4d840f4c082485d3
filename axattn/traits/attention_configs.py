"""Which configs the modules of a model read: at every forward Transformers looks up the attention's name there.

A model reads it to make masks, an attention module to call the kernel. Usually both share one config. Copies come with
copies of modules (T5's stacks, PEFT's ``layer_replication`` and ``modules_to_save``, ``copy.deepcopy`` of a layer), and
with configs that were replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.model_internals import CONFIG_NAME, supports
from axattn.hf.module_walk import named_modules
from axattn.hf.registries import axattn_functions, name_of
from axattn.hf.source_inspection import calls_interface
from axattn.hf.watched import Entry, Watched
from axattn.spec import names
from axattn.traits.layer_needs import sub_configs


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """A config that a module reads and that is not part of its model's config.

    Attributes:
        layer: the module's name in the model.
        module: the module.
        config: its config.
        path: the sub-config of the model that it is a copy of.
    """

    layer: str
    module: torch.nn.Module
    config: Any
    path: str

    @property
    def attends(self) -> bool:
        """Whether the module calls Transformers' attention interface."""
        return is_attention(self.module)


def is_attention(module: torch.nn.Module) -> bool:
    """Whether a module calls Transformers' attention interface in its own ``forward``."""
    cls: Any = type(module)
    return calls_interface(cls)


def copies(model: Any) -> list[Copy]:
    """The modules of a model that read a config outside ``model.config``, outer ones first."""
    from transformers import PreTrainedModel

    own = sub_configs(model.config)
    path_of = {id(config): path for path, config in own}
    known = set(path_of)
    found: list[Copy] = []
    around: dict[str, str] = {}  # by module name: the path of the `PreTrainedModel` around it
    for name, module in named_modules(model):
        path = around.get(name.rpartition(".")[0], "")
        config = _config_of(module)
        if config is not None:
            if id(config) not in path_of:
                path_of[id(config)] = _original(config, own, path)
            if isinstance(module, PreTrainedModel):
                path = path_of[id(config)]
            if id(config) not in known:
                found.append(Copy(name, module, config, path_of[id(config)]))
        around[name] = path
    return found


def layers_apart(copied: Iterable[Copy]) -> list[tuple[str, Any, int]]:
    """Path, config and layer number of the attention modules whose config no inner model reads."""
    from transformers import PreTrainedModel

    copied = list(copied)
    owned = {id(copy.config) for copy in copied if isinstance(copy.module, PreTrainedModel)}
    return [
        (copy.path, copy.config, getattr(copy.module, "layer_idx", None) or 0)
        for copy in copied
        if copy.attends and id(copy.config) not in owned
    ]


def paths_of(model: Any, copied: Iterable[Copy]) -> dict[int, str]:
    """The path of every config that a model's modules read, by ``id(config)``."""
    return {**{id(copy.config): copy.path for copy in copied}, **{id(c): path for path, c in sub_configs(model.config)}}


def _config_of(module: torch.nn.Module) -> Any:
    """The config in which a module looks up the name of its attention, None when it has none."""
    config = vars(module).get("config")
    return config if CONFIG_NAME in getattr(config, "__dict__", ()) else None


def _original(config: Any, own: list[tuple[str, Any]], around: str) -> str:
    """The path of the config that this one copies: one of its class in the model around it, else with equal values."""
    same_class = {path: one for path, one in own if type(one) is type(config)}
    if around in same_class or not same_class:
        return around
    return next((path for path, one in same_class.items() if one.to_dict() == config.to_dict()), next(iter(same_class)))


def reads_masks_of(name: str | None, masks: str | None, model: Any) -> bool:
    """Whether an attention module on one name computes correct results with masks that are made for another name.

    Args:
        name: the name that the module reads.
        masks: the name that its model reads.
        model: the model.
    """
    name, masks = ((one or "eager").removeprefix("paged|") for one in (name, masks))
    if name == masks or name in axattn_functions():  # axattn's attention function reads every kind of mask
        return True
    if name == "sdpa" and (masks == "eager" or masks in axattn_functions()):
        return supports(type(model), "sdpa") and not getattr(model.config, "attn_logit_softcapping", None)
    return names.is_flash(name) and names.is_flash(masks)


class NameCheck:
    """Checks before a forward with an input hook that the attention modules read the name that the masks are made for.

    Modules and configs may have been added or replaced since `axattn.apply` called `copies`. A copy of the check starts
    empty.

    Attributes:
        whole: the children of every module that contains attention.
        entries: the configs of the model and its attention modules, and the names in configs of their own.
    """

    def __init__(self) -> None:
        self.whole: list[dict[str, torch.nn.Module | None]] = []
        self.entries: list[Entry] = []
        self._watched: Watched | None = None
        self._own_configs: list[tuple[str, Any, Any]] = []

    def __reduce__(self) -> Any:
        return NameCheck, ()  # the copy of a layer's hook would hold the whole model

    def look(self, model: Any) -> None:
        """Find the attention modules of a model, without those of inner models, which have their own input hooks."""
        self.whole = []
        layers: list[tuple[str, torch.nn.Module]] = []
        self._find(model, "", layers)
        self.entries = [(module.__dict__, "config") for module in (model, *(module for _, module in layers))]
        own = sub_configs(model.config)
        known = {id(config) for _, config in own}
        apart = []
        for layer, module in layers:
            config = _config_of(module)
            if config is not None and id(config) not in known:
                known.add(id(config))
                apart.append((layer, config, dict(own)[_original(config, own, "")]))
        self._own_configs = apart
        self.entries += [(vars(config), CONFIG_NAME) for _, *both in apart for config in both]
        self._watched = Watched(self.whole, self.entries)

    def _find(self, module: torch.nn.Module, name: str, layers: list[tuple[str, torch.nn.Module]]) -> bool:
        """Whether a module contains attention; records where, in `layers` and `self`."""
        from transformers import PreTrainedModel

        found = not name
        for key, child in module._modules.items():
            if child is None or isinstance(child, PreTrainedModel):
                continue
            below = f"{name}.{key}" if name else key
            attends = is_attention(child)
            if attends:
                layers.append((below, child))
            found = self._find(child, below, layers) or attends or found
        if found:
            self.whole.append(module._modules)
        return found

    def require(self, model: Any) -> None:
        """Raise if a layer reads another name and would misread the masks.

        Raises:
            UnsupportedAttentionError: with the layer and both names.
        """
        if not torch.compiler.is_compiling() and (self._watched is None or not self._watched.unchanged()):
            self.look(model)
        for layer, config, original in self._own_configs:
            name, masks = name_of(config), name_of(original)
            if name != masks and not reads_masks_of(name, masks, model):
                raise UnsupportedAttentionError(
                    f"{masks} can't serve {layer} of {type(model).__name__}",
                    [
                        Reason(
                            "config",
                            f"the layer reads {name!r} in a config of its own, and its masks are made for {masks!r}",
                        )
                    ],
                    f'Call axattn.apply(model, "{masks}") again: it switches every config that a layer reads.',
                )
