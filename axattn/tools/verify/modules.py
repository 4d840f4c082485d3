"""Verifies single attention modules, which takes seconds and little memory for any model size.

Each kind of attention module gets random queries, keys and values of its shapes, as two packed documents. Its kernel's
output and gradients are compared with the model's eager function in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from axattn.attention.interface import attend
from axattn.backends import get
from axattn.backends.call import AttentionCall
from axattn.backends.eager import eager
from axattn.documents.boundaries import Segments
from axattn.errors import AxattnError
from axattn.hf.registries import name_of
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import lazy_mask
from axattn.patches.state import state_of, transformers_model
from axattn.planning.routes import ATTRIBUTE, Route
from axattn.spec.capability import Need
from axattn.tools.verify.records import Check
from axattn.traits.attention_configs import copies, paths_of, reads_masks_of
from axattn.traits.layer_needs import sub_configs

LENGTH, _CUT = 160, 57  # tokens, and the start of the second document
BUDGET = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest allowed relative error; float32 on a GPU may run in TF32."""
LOSSY = 0.08


def verify_modules(model: torch.nn.Module, dtype: torch.dtype | None = None) -> list[Check]:
    """Check output, dq, dk and dv of each kind of attention module that axattn routes.

    Args:
        model: a Transformers model, or a wrapper around one.
        dtype: of the inputs; None for the model's.
    """
    base = transformers_model(model)
    state = state_of(base)
    planned = (
        {} if state is None or state.plan is None else {(e.layer.path, e.layer.index): e for e in state.plan.layers}
    )
    copied = copies(base)
    path_of, configs = paths_of(base, copied), dict(sub_configs(base.config))
    checks, seen = [], set()
    for copy in copied:
        name, masks = name_of(copy.config), name_of(configs[copy.path])
        if copy.attends and not reads_masks_of(name, masks, base):
            text = f"its own config names {name!r}, but its masks are made for {masks!r}"
            checks.append(Check(copy.layer, "wrong", math.inf, 0.0, text))
    for name, module in base.named_modules():
        route: Route | None = vars(module).get(ATTRIBUTE)
        if route is None:
            continue
        where = (path_of.get(id(getattr(module, "config", None)), ""), getattr(module, "layer_idx", None) or 0)
        need = planned[where].layer.need if where in planned else None
        if need is None or not need.heads or not need.head_dim or need.bias or need.sparse:
            continue  # its config does not describe it, or its calls need inputs that only the model has
        kind = (need, route.candidates, type(module))
        if kind not in seen:
            seen.add(kind)
            checks.append(_check(name, module, route, need, dtype))
    return checks


def _keywords(module: Any, need: Need) -> dict[str, Any]:
    """The keywords that the module's forward passes to the attention function, as far as they have common names."""
    found: dict[str, Any] = {"scaling": getattr(module, "scaling", None), "sliding_window": need.window}
    if need.softcap is not None:
        found["softcap"] = need.softcap
    sinks = getattr(module, "sinks", None)
    if isinstance(sinks, torch.Tensor):
        found["s_aux"] = sinks.detach()
    return found


def _mask(need: Need, device: torch.device) -> LazyMask:
    """The mask of two packed documents under a layer's rule, made as Transformers makes it."""
    from transformers import masking_utils as mu

    function = mu.causal_mask_function if need.causal else mu.bidirectional_mask_function
    if need.causal and need.window is not None:
        function = mu.sliding_window_causal_mask_function(need.window)
    elif need.window is not None:
        function = mu.sliding_window_bidirectional_mask_function(need.window)
    mask = lazy_mask(1, LENGTH, LENGTH, mask_function=function, device=device)
    return mask.with_segments(Segments(((0, _CUT, LENGTH),), device))


def _dense(need: Need, device: torch.device) -> torch.Tensor:
    """The same mask computed independently, bool ``[1, 1, S, S]``: the reference must not share a fault of axattn's
    masks."""
    index = torch.arange(LENGTH, device=device)
    distance = index[:, None] - index
    visible = (index[:, None] < _CUT) == (index < _CUT)
    if need.causal:
        visible = visible & (distance >= 0)
    if need.window is not None:
        visible = visible & (distance.abs() < need.window)
    return visible[None, None]


def _inputs(need: Need, dtype: torch.dtype, device: torch.device) -> Iterator[torch.Tensor]:
    heads, size = need.heads or 1, need.head_dim or 1
    generator = torch.Generator().manual_seed(0)
    for count, wide in (
        (heads, size),
        (need.kv_heads or heads, size),
        (need.kv_heads or heads, need.value_dim or size),
    ):
        yield torch.randn(1, count, LENGTH, wide, generator=generator).to(device, dtype)


def _check(name: str, module: Any, route: Route, need: Need, dtype: torch.dtype | None) -> Check:
    weight = next(module.parameters())
    kind, device = dtype or weight.dtype, weight.device
    keywords = _keywords(module, need)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = [x.requires_grad_() for x in _inputs(need, kind, device)]
        q, k, v = inputs
        shape = (1, LENGTH, q.shape[1], v.shape[-1])
        target = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        before = dict(route.served)
        try:
            out, _ = attend(route.asked, module, q, k, v, _mask(need, device), dropout=0.0, **keywords)
        except AxattnError as refusal:
            reasons = "; ".join(dict.fromkeys(r.text for r in refusal.reasons)) or str(refusal)
            return Check(name, "refused", detail=reasons)
        used = next(kernel for kernel, count in route.served.items() if count != before.get(kernel, 0))
        route.served.clear()
        route.served.update(before)
        if out.grad_fn is None:
            return Check(name, "wrong", math.inf, 0.0, f"{used}: its output has no gradient")
        found: dict[str, torch.Tensor | None] = {"output": out}
        grads = torch.autograd.grad(out, inputs, target.to(out.dtype), allow_unused=True)
        found |= zip(("dq", "dk", "dv"), grads, strict=True)
        exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
        exact_out = _exact(module, exact_inputs, _dense(need, device), keywords)
        exact_grads = torch.autograd.grad(exact_out, exact_inputs, target)
        exact = {"output": exact_out, **dict(zip(("dq", "dk", "dv"), exact_grads, strict=True))}
    budget = BUDGET.get(kind, 2e-3) + (LOSSY if get(used).capability.exactness == "lossy" else 0.0)
    worst, where = 0.0, ""
    for key, wanted in exact.items():
        got = found[key]
        if got is None or not torch.isfinite(got).all():
            what = "missing" if got is None else "not finite"
            return Check(name, "wrong", math.inf, budget, f"{used}: {key} is {what}")
        if key != "output" and not got.any():
            return Check(name, "wrong", 1.0, budget, f"{used}: {key} is zero")
        error = ((got.float() - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()
        if error > worst:
            worst, where = error, key
    wrong = worst > budget
    return Check(name, "wrong" if wrong else "ok", worst, budget, f"{used}: {where}" if wrong else used)


def _exact(module: Any, inputs: list[torch.Tensor], mask: torch.Tensor, keywords: dict[str, Any]) -> torch.Tensor:
    q, k, v = inputs
    scale = keywords.get("scaling")
    extras = {key: value for key, value in keywords.items() if key not in ("dropout", "scaling", "s_aux")}
    if "s_aux" in keywords:
        extras["s_aux"] = keywords["s_aux"].float()
    call = AttentionCall(
        module=module,
        query=q,
        key=k,
        value=v,
        mask=mask,
        causal=True,
        window=None,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=0.0,
        softcap=keywords.get("softcap"),
        sinks=extras.get("s_aux"),
        bias=None,
        extras=extras,
    )
    return eager(call)
