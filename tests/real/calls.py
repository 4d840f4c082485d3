"""A `Need` as a small call on a CPU, and what the call should give: attention in float32, written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils

from axattn.backends.call import AttentionCall
from axattn.masks.mask_interface import lazy_mask
from axattn.spec.capability import Need

ROWS, LENGTH, LONGER, WINDOW = 2, 24, 37, 7
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-4}
"""Of the norm of the difference by the norm expected."""


@dataclass
class Small:
    """A call, its rule and the weights of its loss.

    Attributes:
        call: ``[ROWS, H, LENGTH, D]``; the second row is padded on the left.
        seen: bool ``[ROWS, 1, S, T]``.
        real: bool ``[ROWS, S]``, queries that are no padding.
        loss: float32 ``[ROWS, S, H, Dv]``.
    """

    call: AttentionCall
    seen: torch.Tensor
    real: torch.Tensor
    loss: torch.Tensor


def small(need: Need) -> Small:
    """The call that a need describes, with lengths and a window that a CPU can afford."""
    assert not any((need.chunk, need.bias, need.sparse))
    torch.manual_seed(0)
    S, T, D, H = LENGTH, LONGER if need.cross_lengths else LENGTH, need.head_dim or 64, need.heads or 8
    dtype, value_dim = getattr(torch, str(need.dtype)), need.value_dim or D
    shapes = ((H, S, D), (need.kv_heads or H, T, D), (need.kv_heads or H, T, value_dim))
    q, k, v = (torch.randn(ROWS, *shape, dtype=dtype, requires_grad=need.gradient) for shape in shapes)
    sinks = torch.randn(H, dtype=dtype, requires_grad=need.gradient) if need.sinks else None
    window = WINDOW if need.window is not None else None
    padding = torch.ones(ROWS, T, dtype=torch.bool)
    padding[1, :5] = False
    mask = lazy_mask(ROWS, S, T, T - S, 0, _rule(need.causal, window), padding, device="cpu")
    distance = torch.arange(T - S, T)[:, None] - torch.arange(T)
    seen = (distance >= 0) if need.causal else torch.ones_like(distance, dtype=torch.bool)
    seen = seen if window is None else seen & (distance.abs() < window)
    call = AttentionCall(
        torch.nn.Identity(), q, k, v, mask, need.causal, window, D**-0.5, need.dropout, need.softcap, sinks, None, {}
    )
    real = padding[:, T - S :]
    loss = torch.randn(ROWS, S, H, value_dim) * real[..., None, None]
    return Small(call, seen & padding[:, None, None], real, loss)


def _rule(causal: bool, window: int | None) -> Any:
    if window is None:
        return masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    if causal:
        return masking_utils.sliding_window_causal_mask_function(window)
    return masking_utils.sliding_window_bidirectional_mask_function(window - 1)


def expected(case: Small) -> torch.Tensor:
    """``[B, S, H, Dv]`` in float32, with a graph where the call has one."""
    call = case.call
    group = call.query.shape[1] // call.key.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (call.key, call.value))
    logits = call.query.float() @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.masked_fill(~case.seen, -1e30)
    if call.sinks is not None:
        column = call.sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    return (logits.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def wrong(need: Need, kernel: Callable[[AttentionCall], torch.Tensor]) -> str:
    """What a kernel gets wrong of a need: an error that it raises, or how far it is off; ``""`` where it is right."""
    case = small(need)
    call = case.call
    inputs = (call.query, call.key, call.value, *(() if call.sinks is None else (call.sinks,)))
    try:
        out = kernel(call)
        found = torch.autograd.grad((out.float() * case.loss).sum(), inputs) if need.gradient else ()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if need.dropout:  # which weights were dropped is not known, but the output is linear in the values
        if not need.gradient:
            return "" if bool(out.isfinite().all()) else "not finite"
        both = [(out.float() * case.loss).sum(), (found[2].float() * call.value.float()).sum()]
        return _far("d value under dropout", both[1], both[0], need, floor=case.loss.norm())
    wanted = expected(case)
    said = _far("output", out.float()[case.real], wanted[case.real], need)
    if need.gradient and not said:
        grads = torch.autograd.grad((wanted * case.loss).sum(), inputs)
        names = ("d query", "d key", "d value", "d sinks")[: len(inputs)]
        said = next(filter(None, (_far(n, f, w, need) for n, f, w in zip(names, found, grads, strict=True))), "")
    return said


def _far(name: str, found: torch.Tensor, wanted: torch.Tensor, need: Need, floor: Any = 0.0) -> str:
    scale = torch.maximum(wanted.float().norm(), torch.as_tensor(floor))
    error = float(((found.float() - wanted.float()).norm() / scale).detach())
    return "" if error <= TOLERANCE[str(need.dtype)] else f"{name} is {error:.2g} off"
