"""`plan`: which kernel each layer gets and why not the others. Pure: needs, names, machine and policy in, plan out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace as replaced
from typing import Any

from axattn import backends, names
from axattn.backends.base import Backend
from axattn.backends.dense import native_note
from axattn.backends.ranking import by_need, interned, ranking, usable
from axattn.by_path import resolve_names
from axattn.capability import Need, missing
from axattn.environment import Environment
from axattn.errors import BackendUnavailableError, Reason, UnsupportedAttentionError
from axattn.needs import LayerNeed, ModelNeeds
from axattn.options import require_options
from axattn.plans import LayerPlan, Plan, Policy, Rejected
from axattn.routes import candidates, providers


def plan(
    needs: ModelNeeds,
    value: names.AttentionNames,
    environment: Environment,
    policy: Policy,
) -> Plan:
    """Decide for every layer which kernel it gets.

    Args:
        needs: what the model asks for.
        value: canonical name, or dict of names by sub-config.
        environment: the machine.
        policy: what the user allows.

    Raises:
        UnknownAttentionError: a key of the dict is no sub-config.
        BackendUnavailableError: this machine can't run the name.
        UnsupportedAttentionError: a layer needs what the kernel lacks, and the policy is ``"raise"``.
        InvalidConfigError: an option that no kernel named offers, or a value that it can't use.
    """
    asked = resolve_names(value, needs.paths)
    require_options(
        policy.options, {name: backend_of(name).options for name in names.names_in(value) if name != "auto"}
    )
    notes: list[str] = []
    running: dict[str, str | None] = {}
    layers: list[LayerPlan] = []
    orders: dict[str, tuple[str, ...]] = {}
    for path, name in asked.items():
        mine = [layer for layer in needs.layers if layer.path == path]
        if name is None:
            running[path] = None
            continue
        running[path], planned, orders[path] = _plan_path(needs.model, path, name, mine, environment, policy, notes)
        layers += planned
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
    )


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
    options: Mapping[str, Any] | None = None,
) -> None:
    """Raise unless this machine can run the name (with these ``kernel_options``).

    Raises:
        BackendUnavailableError: with every reason, the command that mends each, and the exact kernels that do run here.
    """
    if name == "auto":
        return
    probed = [backend_of(served).probe(environment) for served in providers(backend_of(name), options or {})]
    reasons = [] if [] in probed else list(dict.fromkeys(reason for found in probed for reason in found))
    path = names.parse_hub_path(name.removeprefix("paged|"))
    if path is not None and not allow_all_kernels:
        if not path.repository.startswith("kernels-community/"):
            text = f"{path.repository} is not published by kernels-community, and hub kernels run code"
            reasons.append(Reason("trust", text, "allow_all_kernels=True, if you trust it"))
        elif path.revision is None:
            text = "no revision is pinned: the code that runs may change under you"
            reasons.append(Reason("trust", text, f"{path.repository}@REVISION, or allow_all_kernels=True"))
    if name.startswith("paged|") and name != "paged|eager" and environment.has("transformers", "5.23"):
        text = f"transformers {environment.libraries['transformers']} no longer takes {name!r}"
        reasons.append(Reason("paged", text, name.removeprefix("paged|")))
    device = environment.torch_device
    served = backend_of(name).capability_on(environment).devices
    if device not in served and not any(reason.feature == "gpu" for reason in reasons):
        reasons.append(Reason("gpu", f"{name} runs on {', '.join(sorted(served))}, this machine has {device}"))
    if reasons:
        fixes = list(dict.fromkeys(reason.fix for reason in reasons if reason.fix))
        advice = f"To mend it: {'; '.join(fixes)}. " if fixes else ""
        exact = ", ".join(usable_exact(environment))
        advice += f'Exact kernels this machine has: {exact}; or attn_implementation="auto".'
        raise BackendUnavailableError(f"{name} can't run on this machine", reasons, advice)


def _plan_path(
    model: str,
    path: str,
    name: str,
    layers: list[LayerNeed],
    environment: Environment,
    policy: Policy,
    notes: list[str],
) -> tuple[str, list[LayerPlan], tuple[str, ...]]:
    """The name that Transformers is given, a plan per layer, and the backends that the layers may use."""
    route = name == "auto" or policy.on_unsupported == "route"
    upgraded = _upgraded(name, layers, environment) if policy.upgrade_flash else None
    if upgraded is not None:
        where = path or "the model"
        notes.append(
            f"flash_attention_2 → flash_attention_4 for {where}: {environment.describe()} runs it and it serves every "
            "layer (AXATTN_NO_FA4=1 or upgrade_flash=False keeps flash_attention_2)"
        )
        return "flash_attention_4", upgraded, ()
    try:
        require_available(name, environment, allow_all_kernels=policy.allow_all_kernels, options=policy.options)
    except BackendUnavailableError as error:
        if not route or name in ("s2",):
            raise
        notes.append(f"{name} → auto for {path or 'the model'}: {error}")
        return _plan_path(model, path, "auto", layers, environment, policy, notes)
    if names.is_native(name):
        planned = _plan_layers(layers, name, (name,), environment)
        failed = [entry for entry in planned if not entry.chosen]
        if not failed:
            if name == "sdpa" and (text := native_note(environment)):
                notes.append(text)
            return name, planned, ()
        if not route:
            raise _unsupported(model, name, failed)
        notes.append(f"{name} → auto for {path or 'the model'}: it can't serve every layer")
        direct = backend_of(name).forward is not None
        order = candidates(name, "route", environment)
        order = order if direct else interned(order[1:])
        return "auto", _plan_layers(layers, name, order, environment), order
    if name == "s2":
        _require_llama(model, path, layers)
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


def _upgraded(name: str, layers: list[LayerNeed], environment: Environment) -> list[LayerPlan] | None:
    """The plan of ``flash_attention_2`` on FlashAttention 4; None unless the machine and every known layer allow it."""
    if name != "flash_attention_2" or not layers or (environment.sm or 0) < 90:
        return None
    if backend_of("flash_attention_4").probe(environment):
        return None
    planned = _plan_layers(layers, name, ("flash_attention_4",), environment)
    return planned if all(entry.chosen for entry in planned) else None


def _plan_layers(
    layers: list[LayerNeed], asked: str, order: tuple[str, ...], environment: Environment
) -> list[LayerPlan]:
    """A plan per layer; layers with the same need are decided once."""
    decided: dict[Need, LayerPlan] = {}
    for layer in layers:
        if layer.need not in decided:
            decided[layer.need] = _plan_layer(layer, asked, order, environment)
    return [replaced(decided[layer.need], layer=layer) for layer in layers]


def _plan_layer(layer: LayerNeed, asked: str, order: tuple[str, ...], environment: Environment) -> LayerPlan:
    rejected: list[Rejected] = []
    need: Need = replaced(layer.need, device=environment.torch_device)
    for name in by_need(order, need) if asked == "auto" else order:
        backend = backend_of(name)
        lacking = missing(need, backend.capability_on(environment), name)
        reasons = [*backend.probe(environment), *lacking] if len(order) > 1 else lacking
        if not reasons:
            return LayerPlan(layer, asked, name, tuple(rejected))
        rejected.append(Rejected(name, tuple(reasons)))
    return LayerPlan(layer, asked, "", tuple(rejected))


def _require_llama(model: str, path: str, layers: list[LayerNeed]) -> None:
    plain = all(layer.kind == "full_attention" for layer in layers)
    if "llama" not in model.lower() or "llama4" in model.lower() or path or not plain:
        raise UnsupportedAttentionError(
            f"s2 can't serve {model}",
            [Reason("model", "shifted sparse attention is defined for LLaMA models only")],
            'Use attn_implementation="varlen" or "auto".',
        )


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
