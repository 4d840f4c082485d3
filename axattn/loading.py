"""The functions that users call: `from_pretrained`, `apply`, `restore`, `using`, `plan`, `status`.

Every change to a model goes through a `PatchSet`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from axattn import backends
from axattn.attention.registration import register_free
from axattn.hf import canary, mask_functions
from axattn.hf.checkpoints import concrete_class, load_config, load_weights, resolve_class
from axattn.hf.module_walk import one_walk
from axattn.machine.environment import Environment
from axattn.machine.presets import as_environment
from axattn.patches import copied_modules
from axattn.patches.cache import disable_cache
from axattn.patches.flash_slot import preload
from axattn.patches.flex import add_recompile_limit
from axattn.patches.input_hooks import add_input_hooks, native_name, refuse_second_gradients
from axattn.patches.native_gradients import require_gradients
from axattn.patches.paged_steps import add_paged_steps
from axattn.patches.patchset import PatchSet
from axattn.patches.recurrent import add_document_runs
from axattn.patches.rope import add_rope_by_document
from axattn.patches.routes import add_routes, set_names
from axattn.patches.state import ATTRIBUTE, State, state_of, transformers_model
from axattn.patches.token_dropout import add_shares_by_document
from axattn.planning.decision import decide, policy_of
from axattn.planning.model_classes import require_interface
from axattn.planning.plan import Plan
from axattn.planning.routes import OnUnsupported
from axattn.reporting import Status, read_status
from axattn.spec import names
from axattn.spec.notices import warn_once
from axattn.spec.sub_config_names import nested
from axattn.traits.attention_configs import Copy, copies, paths_of
from axattn.traits.config_checks import require_possible
from axattn.traits.layer_needs import sub_configs
from axattn.unpadding.shared_prefixes import add_shared_prefixes
from axattn.unpadding.unpadded_forward import add_unpadding

PATCHES: dict[str, Callable[[PatchSet, torch.nn.Module], object]] = {
    "no cache": disable_cache,
    "recompile limit": add_recompile_limit,
}
"""The valid names in `axattn.backends.base.Backend.patches`."""


def from_pretrained(
    pretrained_model_name_or_path: Any,
    *args: Any,
    attn_implementation: names.AttentionNames | None = "auto",
    model_class: Any = None,
    on_unsupported: OnUnsupported = "raise",
    upgrade_flash: bool = True,
    kernel_options: Mapping[str, Any] | None = None,
    unpad: bool = False,
    share_prefixes: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a Transformers model that runs on the named attention, or raise before the weights are loaded.

    Args:
        pretrained_model_name_or_path: hub name or local folder, as for Transformers.
        *args: positional arguments for the model class.
        attn_implementation: canonical name, hub path, or dict per sub-config (``{"": ..., "text_config": ...}``). None
            means ``"auto"``.
        model_class: any Auto class or model class. None means the class in the checkpoint's ``architectures``, else
            ``AutoModelForCausalLM``.
        on_unsupported: ``"raise"``, or ``"route"``: layers that the kernel can't serve run on the next exact one.
        upgrade_flash: run ``flash_attention_2`` as ``flash_attention_4`` where that is installed, serves every layer
            forward and backward, and is faster (Hopper, sm100) or the only one. A warning reports it, and `status`
            shows both names. ``AXATTN_NO_FA4=1`` turns it off.
        kernel_options: options of the named kernels, such as ``{"group_size": 512}`` for ``s2``.
        unpad: run padded batches through the whole model as one packed row of their real tokens. Outputs return to
            their positions, with zeros at padding (see `axattn.unpadding.unpadded_forward`).
        share_prefixes: run what several documents of a batch begin with (a prompt with its completions) once, through
            the backbone; outputs, losses and gradients stay those of the batch
            (see `axattn.unpadding.shared_prefixes`).
        **kwargs: passed to ``from_pretrained`` of the model class.

    Returns:
        What the model class returns (with ``output_loading_info=True``: a tuple).

    Raises:
        UnknownAttentionError: the name is unknown.
        BackendUnavailableError: this machine can't run it.
        UnsupportedAttentionError: the model or one of its layers needs a feature that the kernel lacks.
        RegistrationError: another package has registered its own function under the name.
        InvalidConfigError: an unknown kernel option or an invalid value; impossible head counts, sizes or windows in
            the config.
        InvalidInputError: there is no model at that path or name, or `model_class` is not a model class.
    """
    value = names.canonicalise_all("auto" if attn_implementation is None else attn_implementation)
    register_free()
    canary.check(apply)
    config, kwargs = load_config(pretrained_model_name_or_path, kwargs)
    cls = resolve_class(model_class, config)
    require_possible(config, concrete_class(cls, config))
    allow = bool(kwargs.get("allow_all_kernels", False))
    decided = decide(
        config, concrete_class(cls, config), value, policy_of(on_unsupported, allow, upgrade_flash, kernel_options)
    )
    preload(decided, allow_all_kernels=allow)
    config._attn_implementation = None  # a name in config.json would override the argument (Transformers 5.23)
    native = {path: name for path, name in decided.running.items() if name is not None and names.is_native(name)}
    if native:
        kwargs["attn_implementation"] = nested(dict(native))
    loaded = load_weights(cls, pretrained_model_name_or_path, *args, config=config, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    _attach(model, decided, value, allow, unpad, share_prefixes)
    return loaded


def apply(
    model: torch.nn.Module,
    attn_implementation: names.AttentionNames,
    *,
    on_unsupported: OnUnsupported = "raise",
    allow_all_kernels: bool = False,
    upgrade_flash: bool = True,
    kernel_options: Mapping[str, Any] | None = None,
    unpad: bool = False,
    share_prefixes: bool = False,
) -> torch.nn.Module:
    """Switch a loaded model to the named attention, after undoing an earlier `apply`.

    `prepare_for_training` and `axattn.sequence_parallel` stay in effect.

    Args:
        model: a Transformers model, or a wrapper around one (PEFT).
        attn_implementation: as for `from_pretrained`.
        on_unsupported: as for `from_pretrained`.
        allow_all_kernels: as in Transformers: run hub kernels of any publisher. Publishers that the hub marks as
            trusted don't need it.
        upgrade_flash: as for `from_pretrained`.
        kernel_options: as for `from_pretrained`.
        unpad: as for `from_pretrained`.
        share_prefixes: as for `from_pretrained`.

    Returns:
        `model`.

    Raises:
        AxattnError: as for `from_pretrained`; the model is left unchanged.
    """
    base = transformers_model(model)
    value = names.canonicalise_all(attn_implementation)
    policy = policy_of(on_unsupported, allow_all_kernels, upgrade_flash, kernel_options)
    register_free()
    canary.check(apply)
    decided = decide(base.config, type(base), value, policy, copied=copies(base))
    preload(decided, allow_all_kernels=allow_all_kernels)
    before = state_of(base)
    restore(base)
    try:
        _attach(base, decided, value, allow_all_kernels, unpad, share_prefixes)
        _reapply(base, before)
    except BaseException:
        restore(base)
        _reattach(base, before)
        raise
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo every change that axattn made to a model. Does nothing to an unchanged model.

    Copies of its layers and configs that were added since are restored like the originals. A model loaded by
    `from_pretrained` on an axattn backend then runs on Transformers' default attention.
    """
    state = state_of(model)
    if state is not None:
        copied_modules.undo(transformers_model(model), state)
    return model


@contextlib.contextmanager
def using(
    model: torch.nn.Module,
    attn_implementation: names.AttentionNames,
    *,
    on_unsupported: OnUnsupported = "raise",
    allow_all_kernels: bool = False,
    upgrade_flash: bool = True,
    kernel_options: Mapping[str, Any] | None = None,
    unpad: bool = False,
    share_prefixes: bool = False,
) -> Iterator[torch.nn.Module]:
    """`apply` inside a ``with`` block; afterwards the model runs on its previous attention."""
    before = state_of(model)
    apply(
        model,
        attn_implementation,
        on_unsupported=on_unsupported,
        allow_all_kernels=allow_all_kernels,
        upgrade_flash=upgrade_flash,
        kernel_options=kernel_options,
        unpad=unpad,
        share_prefixes=share_prefixes,
    )
    try:
        yield model
    finally:
        restore(model)
        _reattach(transformers_model(model), before)


def _reapply(model: torch.nn.Module, before: State | None) -> None:
    """Repeat the later changes (training, sequence parallelism) on the new plan."""
    for step in before.later if before is not None else ():
        step(model)


def _reattach(model: torch.nn.Module, before: State | None) -> None:
    """Bring a restored model back to an earlier state."""
    if before is not None and before.plan is not None:
        allow = before.allow_all_kernels
        _attach(model, before.plan, before.value, allow, before.unpad, before.share_prefixes)
    _reapply(model, before)


def plan(
    model: Any,
    attn_implementation: names.AttentionNames = "auto",
    *,
    environment: Environment | str | None = None,
    on_unsupported: OnUnsupported = "raise",
    allow_all_kernels: bool = False,
    upgrade_flash: bool = True,
    kernel_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Plan:
    """Which kernel `from_pretrained` or `apply` would give each layer, and why not the others.

    Args:
        model: a model, a config, a hub name or a local folder. No weights are loaded.
        attn_implementation: as for `from_pretrained`.
        environment: the machine or its name (``"sm90"``, see `axattn.machine.presets`); None for this machine.
        on_unsupported: as for `from_pretrained`.
        allow_all_kernels: as for `from_pretrained`.
        upgrade_flash: as for `from_pretrained`.
        kernel_options: as for `from_pretrained`.
        **kwargs: for ``AutoConfig.from_pretrained``.

    Raises:
        AxattnError: as for `from_pretrained`.
    """
    value = names.canonicalise_all(attn_implementation)
    policy = policy_of(on_unsupported, allow_all_kernels, upgrade_flash, kernel_options)
    machine = as_environment(environment)
    copied: list[Copy] = []
    if isinstance(model, torch.nn.Module):
        base = transformers_model(model)
        config: Any = base.config
        cls: type | None = type(base)
        copied = copies(base)
    else:
        is_config = hasattr(model, "sub_configs") and not isinstance(model, type)
        config = model if is_config else load_config(model, kwargs)[0]
        cls = concrete_class(resolve_class(None, config), config)
        require_possible(config, cls)
    return decide(config, cls, value, policy, machine, copied)


def status(model: torch.nn.Module) -> Status:
    """Requested and running attention of each layer, active patches, and calls served."""
    return read_status(transformers_model(model))


@one_walk()
def _attach(
    model: torch.nn.Module,
    decided: Plan,
    value: names.AttentionNames,
    allow_all_kernels: bool,
    unpad: bool,
    share_prefixes: bool,
) -> None:
    """Patch a loaded model to run as planned; undo everything on an error."""
    from transformers import PreTrainedModel

    mask_functions.known()  # read now: the first read inside torch.compile would cost a second graph
    configs = dict(sub_configs(model.config))
    modules = dict(model.named_modules())
    native_paths = {p for p, name in decided.running.items() if name is None or names.is_native(name)}
    copied = copies(model)
    path_of = paths_of(model, copied)
    inner = [
        m
        for m in modules.values()
        if isinstance(m, PreTrainedModel) and path_of.get(id(m.config), "") not in native_paths
    ]
    require_interface(decided.model, [type(module) for module in inner])
    for note in decided.notes:
        warn_once(note)
    with PatchSet() as patches:
        state = State(decided, patches, value, allow_all_kernels, unpad, share_prefixes, configs=configs)
        patches.set_attribute(model, ATTRIBUTE, state)
        set_names(patches, model, copied, decided, allow_all_kernels=allow_all_kernels)
        native = {
            key: native_name(decided.running.get(path), configs[path]._attn_implementation)
            for key, path in path_of.items()
        }
        add_input_hooks(patches, model, modules.values(), native)
        refuse_second_gradients(patches, model, modules.values(), native)
        require_gradients(patches, modules.values(), path_of, decided)
        add_rope_by_document(patches, model)
        add_document_runs(patches, model)
        add_shares_by_document(patches, model)
        add_routes(patches, modules, path_of, decided)
        running = {name.removeprefix("paged|") for name in decided.running.values() if name not in (None, "auto")}
        known = [backends.get(name) for name in running if names.is_native(name) or name in names.axattn_backends()]
        for patch in sorted({patch for backend in known for patch in backend.patches}):
            PATCHES[patch](patches, model)
        add_paged_steps(patches, model, decided)
        if unpad:
            add_unpadding(patches, model, decided)
        if share_prefixes:
            add_shared_prefixes(patches, model, decided)
