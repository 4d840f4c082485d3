"""Patch: an input hook (`axattn.documents.input_hook`) on each `PreTrainedModel` whose inputs no inner one reads."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from axattn import backends
from axattn.documents.input_hook import InputHook
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.forward_inputs import HOOK_INPUTS
from axattn.hf.integrations import ORIGINAL
from axattn.hf.module_walk import attribute, named_modules
from axattn.hf.source_inspection import code_of, tree_of
from axattn.hf.trial import shared_skeletons
from axattn.hf.weak_cache import weak_cache
from axattn.machine.environment import Environment
from axattn.patches.double_backward import refuse_second_gradient_of_module
from axattn.patches.patchset import PatchSet
from axattn.spec import names
from axattn.spec.capability import Need, missing
from axattn.traits.attention_configs import is_attention
from axattn.traits.model_traits import read_traits
from axattn.traits.native_names import contradictions
from axattn.traits.pooling import reads_tokens


@shared_skeletons()
def add_input_hooks(
    patches: PatchSet, model: torch.nn.Module, modules: Iterable[torch.nn.Module], native: dict[int, str | None]
) -> None:
    """Put an input hook on the model and on every ``PreTrainedModel`` inside it.

    A head that passes its inputs unchanged to its one inner model (``LlamaForCausalLM``) needs none: two hooks cost as
    much as the attention of a layer of a tiny model.

    Args:
        patches: records the hooks.
        model: the model.
        modules: every module of it, itself included.
        native: by ``id(config)``, the native name that Transformers serves there, None for an axattn backend.

    Raises:
        UnsupportedAttentionError: Transformers' flash path would not compute what the model's masks define.
    """
    from transformers import PreTrainedModel

    for module in [m for m in modules if isinstance(m, PreTrainedModel)]:
        inside = [name for name, child in module.named_children() if isinstance(child, PreTrainedModel)]
        if len(inside) == 1 and not reads_tokens(module) and passes_inputs_on(code_of(module).forward, inside[0]):
            continue
        name = native.get(id(module.config), native.get(id(model.config)))
        reasons = contradictions(module) if name is not None and names.is_flash(name) else []
        if reasons:
            advice = 'Use attn_implementation="varlen" or "auto".'
            raise UnsupportedAttentionError(f"{name} can't serve {type(module).__name__}", reasons, advice)
        traits = read_traits(module, name, _nondeterministic(name) if name in names.FLASH else ())
        hook = InputHook(traits)
        hook.state.names.look(module)
        patches.add_undo(hook.remove_watchers)
        patches.add_handle(module.register_forward_pre_hook(hook.pre_forward, with_kwargs=True, prepend=True))
        patches.add_handle(module.register_forward_hook(hook.post_forward, always_call=True))
        for first in _first_attention(module) if traits.on_flash else ():
            patches.add_handle(first.register_forward_pre_hook(hook.check_delivery, with_kwargs=True))


def _first_attention(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The first attention module of a model, and the copies that PEFT's ``modules_to_save`` may run instead."""
    found = {name: module for name, module in named_modules(model) if is_attention(module)}
    first = next(iter(found), "")
    if not first.endswith(ORIGINAL):
        return [found[first]] if first else []
    wrapper = first.removesuffix(ORIGINAL) + "."
    return [one for name, one in found.items() if name.startswith(wrapper)]


def refuse_second_gradients(
    patches: PatchSet, model: torch.nn.Module, modules: Iterable[torch.nn.Module], native: dict[int, str | None]
) -> None:
    """Refuse second derivatives for kernels that Transformers calls and that have none.

    Arguments as for `add_input_hooks`. Names that another library has registered are not checked.
    """
    default = native.get(id(model.config))
    for module in modules:
        name = (native.get(id(attribute(module, "config")), default) or "").removeprefix("paged|")
        known = names.is_native(name) and is_attention(module)
        if known and not backends.get(name).capability.second_gradient:
            hook = functools.partial(refuse_second_gradient_of_module, name)
            patches.add_handle(module.register_forward_hook(hook))


def native_name(name: str | None, default: str | None) -> str | None:
    """The native name that serves a config, None if an axattn backend does."""
    running = name or default
    return running if running is not None and running not in names.axattn_backends() else None


def _nondeterministic(native: str) -> tuple[Reason, ...]:
    """Why a flash kernel has no deterministic gradient on this machine, () if it has one."""
    served = backends.get(native).capability_on(Environment.current())
    lacking = missing(Need(gradient=True, deterministic=True), served, native)
    return tuple(reason for reason in lacking if reason.feature == "deterministic")


@weak_cache
def passes_inputs_on(forward: Any, child: str) -> bool:
    """Whether a ``forward`` method passes every input that an input hook reads to ``self.<child>``, unchanged.

    Read from its source: one call of the child, each such parameter passed by its own name, ``**kwargs`` passed on,
    none of these names assigned, and no other use of the mask (a load-balancing loss multiplies by it, and must not get
    document ids). False if the source can't be read.
    """
    function = tree_of(forward)
    if function is None:
        return False
    parameters = inspect.signature(inspect.unwrap(forward)).parameters
    spread = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    read = [name for name in parameters if name in HOOK_INPUTS]
    nodes = list(ast.walk(function))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{child}"]
    masked = [node for node in nodes if isinstance(node, ast.Name) and node.id == "attention_mask"]
    if not spread or len(calls) != 1 or calls[0].args or stored & {*read, *spread} or len(masked) > 1:
        return False
    passed = {kw.arg: kw.value.id for kw in calls[0].keywords if isinstance(kw.value, ast.Name)}
    changed = any(f"{spread[0]}{how}" in ast.unparse(function) for how in (".pop(", ".update(", "[", ".setdefault("))
    return not changed and passed.get(None) == spread[0] and all(passed.get(name) == name for name in read)
