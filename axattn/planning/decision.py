"""What `axattn.loading` decides before it changes a model: the plan, and whether this process can run it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from axattn.errors import InvalidConfigError, UnsupportedAttentionError
from axattn.hf import contracts, hub_kernels
from axattn.hf.registries import require_free
from axattn.machine.environment import Environment
from axattn.planning import planner
from axattn.planning.model_classes import around_towers, inner_model_classes, native_support_reasons
from axattn.planning.plan import Plan, Policy
from axattn.planning.routes import OnUnsupported
from axattn.spec import names
from axattn.spec.options import require_mapping
from axattn.traits.attention_configs import Copy, layers_apart
from axattn.traits.layer_needs import ModelNeeds, model_needs


def policy_of(
    on_unsupported: OnUnsupported, allow_all_kernels: bool, upgrade_flash: bool, options: Mapping[str, Any] | None
) -> Policy:
    """The arguments of `axattn.apply` as a policy.

    Raises:
        InvalidConfigError: an argument of the wrong type or value.
    """
    if on_unsupported not in ("raise", "route"):
        raise InvalidConfigError(f'on_unsupported={on_unsupported!r} is neither "raise" nor "route"')
    require_mapping(options)
    kept = os.environ.get("AXATTN_NO_FA4", "").lower() in ("1", "true", "yes")
    return Policy(on_unsupported, allow_all_kernels, upgrade_flash and not kept, {} if options is None else options)


def decide(
    config: Any,
    cls: type | None,
    value: names.AttentionNames,
    policy: Policy,
    environment: Environment | None = None,
    copied: Sequence[Copy] = (),
) -> Plan:
    """The plan of a model, checked: its classes call Transformers' attention interface, no other package has registered
    the planned names, and the installed versions run them.

    Args:
        config: the model's config.
        cls: the model's class, None if unknown.
        value: the canonical names.
        policy: see `policy_of`.
        environment: the machine; None for this one.
        copied: modules and configs that were copied from the model's own.

    Raises:
        AxattnError: as for `axattn.from_pretrained`.
    """
    needs: ModelNeeds = model_needs(config, cls.__name__ if cls is not None else "", layers_apart(copied))
    if environment is None:
        policy = _with_trusted(policy, value)
    require_free(names.names_in(value), needs.model)
    placed, notes = around_towers(config, cls, value, policy)
    machine = environment or Environment.current()
    decided = planner.plan(needs, placed, machine, policy)
    require_free([name for name in decided.running.values() if name is not None], needs.model)
    _require_contracts(needs.model, decided)
    inner = inner_model_classes(config) if isinstance(value, str) else {}
    for path, name in decided.running.items():
        classes = [*([cls] if path == "" else ()), *inner.get(path, ())]
        reasons = [reason for c in classes for reason in native_support_reasons(c, name)] if name else []
        if reasons and policy.upgrade_flash and name != decided.asked[path]:  # the model does not support the upgrade
            return decide(config, cls, value, dataclasses.replace(policy, upgrade_flash=False), machine, copied)
        if reasons:
            raise UnsupportedAttentionError(
                f"{name} can't serve {needs.model}",
                list(dict.fromkeys(reasons)),
                'Use attn_implementation="auto", or "eager".',
            )
    return dataclasses.replace(decided, notes=(*decided.notes, *notes))


def _with_trusted(policy: Policy, value: names.AttentionNames) -> Policy:
    """The policy, plus those publishers of the named hub kernels that the hub marks as trusted."""
    paths = [names.parse_hub_path(name.removeprefix("paged|")) for name in names.names_in(value)]
    publishers = {path.repository.split("/")[0] for path in paths if path is not None} - policy.trusted
    if policy.allow_all_kernels or not publishers:
        return policy
    found = {publisher for publisher in publishers if hub_kernels.is_trusted(publisher)}
    return dataclasses.replace(policy, trusted=policy.trusted | found)


def _require_contracts(model: str, decided: Plan) -> None:
    """Raise for names that the installed versions can't run correctly (`axattn.hf.contracts`).

    Raises:
        UnsupportedAttentionError: lists every broken contract.
    """
    for name in dict.fromkeys(name for name in decided.running.values() if name is not None):
        refused: list[contracts.Refused] = []
        if not names.is_native(name):
            refused.append("models")
        elif names.is_flash(name):
            refused.append("flash names")
        if name == "fp8":
            refused.append("fp8")
        reasons = contracts.reasons(*refused)
        if reasons:
            newest = contracts.NEWEST_TESTED["transformers"]
            advice = f'Use attn_implementation="sdpa", or install transformers {newest}, the newest tested.'
            raise UnsupportedAttentionError(f"{name} can't serve {model} on these versions", reasons, advice)
