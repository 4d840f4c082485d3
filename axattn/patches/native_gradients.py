"""Patch: refuse backward through attention that Transformers runs on a kernel without a gradient for it.

Whether a model will be trained is unknown at load, and a forward without backward is right: so backward raises, also if
the kernel's output has no graph and gradients would silently be lost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from axattn.backends.hub import without_fixed
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.hub_kernels import build_of
from axattn.hf.model_internals import flash_slot
from axattn.hf.module_walk import attribute
from axattn.hf.torch_internals import is_tracing
from axattn.patches.patchset import PatchSet
from axattn.planning import planner
from axattn.planning.plan import LayerPlan, Plan
from axattn.spec import names
from axattn.traits.attention_configs import is_attention


def require_gradients(
    patches: PatchSet, modules: Iterable[torch.nn.Module], path_of: Mapping[int, str], plan: Plan
) -> None:
    """Put a hook on every attention module on a flash name whose kernel serves it in inference only.

    Args:
        patches: records the hooks.
        modules: every module of the model.
        path_of: result of `axattn.traits.attention_configs.paths_of`.
        plan: plan of the model, whose kernels are loaded.
    """
    layers = {(entry.layer.path, entry.layer.index): entry for entry in plan.layers}
    for module in modules:
        path = path_of.get(id(attribute(module, "config")), "")
        name = plan.running.get(path)
        if name is None or not names.is_flash(name) or not is_attention(module):
            continue
        entry = layers.get((path, getattr(module, "layer_idx", None) or 0))
        reasons = [] if entry is None else _reasons(entry, path, plan)
        if reasons:
            hook = functools.partial(_refuse_backward, name, reasons)
            patches.add_handle(module.register_forward_hook(hook, with_kwargs=True))


def _reasons(entry: LayerPlan, path: str, plan: Plan) -> list[Reason]:
    name = entry.chosen
    record = planner.backend_of(name).capability_on(plan.environment)
    if path in plan.loads:
        slot: Any = flash_slot()
        record = without_fixed(record, name, build_of(slot._flash_varlen_fn), plan.environment)
    return planner.in_training(entry.layer.need, record, name, plan.environment)


def _refuse_backward(
    name: str, reasons: list[Reason], module: torch.nn.Module, args: Any, kwargs: Any, output: Any
) -> Any:
    """Forward hook: return the same output, with a backward that raises."""
    if not torch.is_grad_enabled():
        return output
    if is_tracing():
        if module.training:
            raise _error(name, reasons)
        return output
    first, *rest = output if isinstance(output, tuple) else (output,)
    given = (*args, *kwargs.values(), *module.parameters())
    anchor = next((x for x in (first, *given) if isinstance(x, torch.Tensor) and x.requires_grad), None)
    if anchor is None:
        return output
    refused = _Refused.apply(first, anchor, name, reasons)  # type: ignore[no-untyped-call]  # torch's apply has no types
    return (refused, *rest) if isinstance(output, tuple) else refused


class _Refused(torch.autograd.Function):
    """The identity, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, anchor: torch.Tensor, name: str, reasons: list[Reason]) -> torch.Tensor:
        ctx.name, ctx.reasons = name, reasons
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise _error(ctx.name, ctx.reasons)


def _error(name: str, reasons: list[Reason]) -> UnsupportedAttentionError:
    fixes = list(dict.fromkeys(reason.fix for reason in reasons if reason.fix))
    advice = f"To fix it: {'; '.join(fixes)}. " if fixes else ""
    return UnsupportedAttentionError(f"{name} can't serve training", reasons, advice + 'Or use "auto".')
