"""`plan`: which kernel each layer gets and why not the others. Pure: needs, names, machine and policy in, plan out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace as replaced
from typing import Any

from axattn import backends
from axattn.backends.base import Backend
from axattn.backends.hub import DOWNLOAD_TIME
from axattn.backends.hub_records import FLASH
from axattn.backends.sdpa import native_note
from axattn.errors import BackendUnavailableError, Reason, UnsupportedAttentionError
from axattn.hf.flash_stand_ins import pinned, stand_in
from axattn.machine.environment import Environment
from axattn.planning.plan import LayerPlan, Plan, Policy, Rejected
from axattn.planning.ranking import by_need, interned, ranking, usable
from axattn.planning.routes import candidates, providers
from axattn.spec import names
from axattn.spec.capability import Capability, Need, missing
from axattn.spec.options import require_options
from axattn.spec.sub_config_names import resolve_names
from axattn.traits.layer_needs import LayerNeed, ModelNeeds


def plan(
    needs: ModelNeeds,
    value: names.AttentionNames,
    environment: Environment,
    policy: Policy,
) -> Plan:
    """Decide for every layer which kernel it gets.

    Args:
        needs: what the model needs.
        value: canonical name, or dict of names by sub-config.
        environment: the machine.
        policy: what the user allows.

    Raises:
        UnknownAttentionError: a key of the dict is not a sub-config.
        BackendUnavailableError: this machine can't run the name.
        UnsupportedAttentionError: a layer needs what the kernel lacks, and the policy is ``"raise"``.
        InvalidConfigError: an option that no named kernel has, or an invalid value of one.
    """
    asked = resolve_names(value, needs.paths)
    require_options(
        policy.options, {name: backend_of(name).options for name in names.names_in(value) if name != "auto"}
    )
    notes: list[str] = []
    running: dict[str, str | None] = {}
    layers: list[LayerPlan] = []
    orders: dict[str, tuple[str, ...]] = {}
    loads: dict[str, str] = {}
    for path, name in asked.items():
        within = [layer for layer in needs.layers if layer.path == path]
        if name is None:
            running[path] = None
            continue
        running[path], planned, orders[path] = _plan_path(needs.model, path, name, within, environment, policy, notes)
        layers += planned
        if (kernel := hub_kernel(running[path] or "", environment)) is not None:
            loads[path] = str(kernel)
    return Plan(
        needs.model,
        environment,
        asked,
        running,
        tuple(layers),
        policy.on_unsupported,
        orders,
        needs.unknown,
        tuple(notes),
        dict(policy.options),
        loads,
        _sources(layers, environment),
    )


def _sources(layers: list[LayerPlan], environment: Environment) -> tuple[str, ...]:
    chosen = [backend_of(name) for name in dict.fromkeys(entry.chosen for entry in layers)]
    found = [backend.runs_on(environment) for backend in chosen if backend.runs_on is not None]
    return tuple(text for text in found if text)


def hub_kernel(name: str, environment: Environment) -> names.HubPath | None:
    """The hub kernel, with its revision, that Transformers runs under a name on a machine, or None."""
    bare = name.removeprefix("paged|")
    path = None if names.is_hub_sage(bare) else names.parse_hub_path(bare)
    return stand_in(bare, environment) if path is None else pinned(path, environment)


def backend_of(name: str) -> Backend:
    """The backend record of a canonical name or hub path."""
    return backends.get(name.removeprefix("paged|"))


def usable_exact(environment: Environment) -> list[str]:
    """Exact kernels that this machine can run, fastest first."""
    found = []
    for name in (*usable(environment), *backends.builtin_names()):
        backend = backends.get(name)
        served = environment.torch_device in backend.capability_on(environment).devices
        served = served and not backend.probe(environment)
        if name not in found and served and backend.capability.exactness == "exact":
            found.append(name)
    return found


def require_available(
    name: str,
    environment: Environment,
    *,
    allow_all_kernels: bool = False,
    trusted: frozenset[str] = names.TRUSTED_PUBLISHERS,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Raise unless this machine can run the name (with these ``kernel_options``).

    A flash name without its library can run if Transformers runs a hub kernel instead.

    Raises:
        BackendUnavailableError: with every reason, the command that fixes each, and the exact kernels that run here.
    """
    if name == "auto":
        return
    reasons = why_not(name, environment, options)
    path = names.parse_hub_path(name.removeprefix("paged|"))
    if path is not None and not allow_all_kernels:
        publisher = path.repository.split("/")[0]
        if publisher not in trusted:
            text = f"{publisher} is not a trusted publisher of hub kernels, which run its code"
            reasons.append(Reason("trust", text, "allow_all_kernels=True, if you trust it"))
        elif path.revision is None and names.is_hub_sage(str(path)):
            text = "no revision is pinned, so the code may change"
            reasons.append(Reason("trust", text, f"{path.repository}@REVISION, or allow_all_kernels=True"))
    if name.startswith("paged|") and name != "paged|eager" and environment.has("transformers", "5.23"):
        text = f"transformers {environment.libraries['transformers']} no longer takes {name!r}"
        reasons.append(Reason("paged", text, name.removeprefix("paged|")))
    if reasons:
        fixes = list(dict.fromkeys(reason.fix for reason in reasons if reason.fix))
        advice = f"To fix it: {'; '.join(fixes)}. " if fixes else ""
        exact = ", ".join(usable_exact(environment))
        advice += f'Exact kernels that run here: {exact}; or use attn_implementation="auto".'
        raise BackendUnavailableError(f"{name} can't run on this machine", reasons, advice)


def why_not(name: str, environment: Environment, options: Mapping[str, Any] | None = None) -> list[Reason]:
    """Every reason why a machine can't run a name, publishers aside; empty if it can.

    For a flash name without its library: the reasons of the library and of the hub kernel that replaces it.
    """
    bare = name.removeprefix("paged|")
    kernel = stand_in(bare, environment)
    if kernel is not None:
        reasons = _why_not(str(kernel), environment, {})
        if not reasons:
            return []
        own = _why_not(bare, environment, options) or [
            Reason("library", f"Transformers does not find the distribution of the library of {bare}")
        ]
        instead = f"Transformers would run the hub kernel {kernel} instead"
        reasons[0] = dataclasses.replace(reasons[0], text=f"{instead}, but {reasons[0].text}")
        return list(dict.fromkeys((*own, *reasons)))
    return _why_not(bare, environment, options)


def _why_not(name: str, environment: Environment, options: Mapping[str, Any] | None) -> list[Reason]:
    backend = backend_of(name)
    probed = [backend_of(served).probe(environment) for served in providers(backend, options or {})]
    reasons = [] if [] in probed else list(dict.fromkeys(reason for found in probed for reason in found))
    device = environment.torch_device
    served = backend.capability_on(environment).devices
    known = names.parse_hub_path(name)
    if known is not None and known.repository in FLASH:
        return reasons  # its own probe checks the devices that have a build
    if device not in served and not any(reason.feature == "gpu" for reason in reasons):
        reasons.append(Reason("gpu", f"{name} runs on {', '.join(sorted(served))}; this machine has {device}"))
    return reasons


def _plan_path(
    model: str,
    path: str,
    name: str,
    layers: list[LayerNeed],
    environment: Environment,
    policy: Policy,
    notes: list[str],
) -> tuple[str, list[LayerPlan], tuple[str, ...]]:
    """The name to pass to Transformers, a plan per layer, and the backends that the layers may use."""
    route = name == "auto" or policy.on_unsupported == "route"
    upgraded = _upgraded(name, layers, environment) if policy.upgrade_flash else None
    if upgraded is not None:
        where = path or "the model"
        notes.append(
            f"flash_attention_2 → flash_attention_4 for {where}: {environment.describe()} runs it, and it serves every "
            "layer, forward and backward (AXATTN_NO_FA4=1 or upgrade_flash=False keeps flash_attention_2)"
        )
        return "flash_attention_4", upgraded, ()
    try:
        require_available(
            name,
            environment,
            allow_all_kernels=policy.allow_all_kernels,
            trusted=policy.trusted,
            options=policy.options,
        )
    except BackendUnavailableError as error:
        if not route or backend_of(name).variant is not None:
            raise
        notes.append(f"{name} → auto for {path or 'the model'}: {error}")
        return _plan_path(model, path, "auto", layers, environment, policy, notes)
    if names.is_native(name):
        kernel = hub_kernel(name, environment)
        runs = name if kernel is None else str(kernel)
        planned = _plan_layers(layers, name, (runs,), environment, native=True)
        failed = [entry for entry in planned if not entry.chosen]
        if not failed and (kernel is not None or name not in names.FLASH or _trains(layers, name, environment)):
            notes += _hub_notes(name, kernel, path, layers, environment)
            if name == "sdpa" and (text := native_note(environment)):
                notes.append(text)
            return name, planned, ()
        if not failed and not route:  # axattn calls it, and refuses in training the layers that it can't train
            return "auto", planned, interned((name,))
        if not route:
            raise _unsupported(model, name, failed)
        when = "" if failed else " in training"
        notes.append(f"{name} → auto for {path or 'the model'}: it can't serve every layer{when}")
        direct = backend_of(name).forward is not None and kernel is None
        order = candidates(name, "route", environment)
        if not direct:  # Transformers can run it for a whole model only
            order = interned(tuple(other for other in order if other != name))
            if kernel is not None and kernel.repository not in name:
                notes.append(f"{name} can't serve single layers here without its library: {kernel} runs whole models")
        return "auto", _plan_layers(layers, name, order, environment), order
    variant = None if name == "auto" else backend_of(name).variant
    if variant is not None and (reasons := variant.reasons(model, path, [layer.kind for layer in layers])):
        advice = 'Use attn_implementation="varlen" or "auto".'
        raise UnsupportedAttentionError(f"{name} can't serve {model}", reasons, advice)
    order = candidates(name, policy.on_unsupported, environment, policy.options)
    tried = tuple(rank.name for rank in ranking(environment)) if name == "auto" else order
    planned = _plan_layers(layers, name, tried, environment)
    failed = [entry for entry in planned if not entry.chosen]
    if failed:
        raise _unsupported(model, name, failed)
    for served in dict.fromkeys(entry.chosen for entry in planned):
        notice = backend_of(served).notice
        if notice is not None and (text := notice(environment)):
            notes.append(text)
    return ("sage" if names.is_hub_sage(name) else name), planned, order


def _hub_notes(
    name: str, kernel: names.HubPath | None, path: str, layers: list[LayerNeed], environment: Environment
) -> list[str]:
    """Notes on a hub kernel that runs: which one, at which revision, and what it refuses in training."""
    if kernel is None:
        return []
    where, notes = path or "the model", []
    if names.parse_hub_path(name) is None:
        notes.append(
            f"{name} → {kernel} for {where}: its library is not installed, and Transformers "
            f"{environment.libraries['transformers']} runs this hub kernel instead (at first it {DOWNLOAD_TIME})"
        )
    elif str(kernel) != name:
        notes.append(f"{name} runs at {kernel.revision} for {where}, the revision that Transformers loads")
    record = backend_of(str(kernel)).capability_on(environment)
    lacking = [text for layer in layers for text in in_training(layer.need, record, str(kernel), environment)]
    found = list(dict.fromkeys(reason.text for reason in lacking))
    if found:
        notes.append(f"training {where} on {kernel} is refused in backward: {'; '.join(found)}")
    return notes


def in_training(need: Need, record: Capability, name: str, environment: Environment) -> list[Reason]:
    """Why a kernel that serves a need has no gradient for it; empty if it has one."""
    asked = replaced(need, device=environment.torch_device, gradient=True)
    return missing(asked, record, name)


def _upgraded(name: str, layers: list[LayerNeed], environment: Environment) -> list[LayerPlan] | None:
    """The plan of ``flash_attention_2`` on FlashAttention 4; None unless the machine and every known layer allow it,
    forward and backward, and it is faster there or the only one that runs."""
    if name != "flash_attention_2" or not layers or backend_of("flash_attention_4").probe(environment):
        return None
    ranked = [rank.name for rank in ranking(environment)]
    slower = "flash_attention_4" not in ranked[: ranked.index(name)]
    if slower and not backend_of(name).probe(environment):
        return None
    planned = _plan_layers(layers, name, ("flash_attention_4",), environment, native=True)
    served = all(entry.chosen for entry in planned) and _trains(layers, "flash_attention_4", environment)
    return planned if served else None


def _trains(layers: list[LayerNeed], name: str, environment: Environment) -> bool:
    """Whether a kernel serves every layer in training too. Only the calls show whether there is any."""
    trained = [replaced(layer, need=replaced(layer.need, gradient=True)) for layer in layers]
    return all(entry.chosen for entry in _plan_layers(trained, name, (name,), environment, native=True))


def _plan_layers(
    layers: list[LayerNeed], asked: str, order: tuple[str, ...], environment: Environment, *, native: bool = False
) -> list[LayerPlan]:
    """A plan per layer; layers with the same need are decided once. `native`: Transformers calls the kernel."""
    decided: dict[Need, LayerPlan] = {}
    for layer in layers:
        if layer.need not in decided:
            decided[layer.need] = _plan_layer(layer, asked, order, environment, native)
    return [replaced(decided[layer.need], layer=layer) for layer in layers]


def _plan_layer(
    layer: LayerNeed, asked: str, order: tuple[str, ...], environment: Environment, native: bool
) -> LayerPlan:
    rejected: list[Rejected] = []
    need: Need = replaced(layer.need, device=environment.torch_device)
    for name in by_need(order, need) if asked == "auto" else order:
        backend = backend_of(name)
        served = backend.capability_on(environment) if native else backend.called_capability_on(environment)
        lacking = missing(need, served, name)
        reasons = [*backend.probe(environment), *lacking] if len(order) > 1 else lacking
        if not reasons:
            return LayerPlan(layer, asked, name, tuple(rejected))
        rejected.append(Rejected(name, tuple(reasons)))
    return LayerPlan(layer, asked, "", tuple(rejected))


def _unsupported(model: str, name: str, failed: list[LayerPlan]) -> UnsupportedAttentionError:
    reasons = list(dict.fromkeys(reason for entry in failed for r in entry.rejected for reason in r.reasons))
    numbers = ", ".join(str(entry.layer.index) for entry in failed[:12]) + (", ..." if len(failed) > 12 else "")
    where = f" of {failed[0].layer.path}" if failed[0].layer.path else ""
    plural = "s" if len(failed) > 1 else ""
    advice = 'Use attn_implementation="auto"'
    if name != "auto":
        advice += ', or on_unsupported="route"'
    return UnsupportedAttentionError(
        f"{name} can't serve layer{plural} {numbers}{where} of {model}", reasons, advice + "."
    )
