"""A kernel over spans as one operator under a mask made outside the graph: what a layer compiled by itself runs.

`axattn.backends.compiled` is for whole models, whose masks are made inside the graph. Also what both share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from axattn.backends import dense
from axattn.call import AttentionCall
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.masks import LazyMask, of_handle


def run_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: LazyMask,
    scale: float,
    softcap: float | None,
    kernel: str,
    options: str,
    rule: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Run a backend inside an operator; ``[B, S, H, Dv]``.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        mask: of whole rows.
        scale: factor on the logits.
        softcap: see `axattn.capability.Need`.
        kernel: the backend.
        options: the user's ``kernel_options`` as JSON.
        rule: the dense mask, for padding with holes.

    Raises:
        UnsupportedAttentionError: padding with holes, and a softcap or a kernel that nothing exact may stand in for.
    """
    from axattn import backends

    causal = mask.pattern is None or mask.pattern.causal
    call = AttentionCall(_NONE, query, key, value, mask, causal, None, scale, 0.0, softcap, None, None, {})
    call.options = json.loads(options)
    if mask.layout() is None:  # padding with holes: no spans
        if softcap is not None or backends.get(kernel).evaluates:
            raise UnsupportedAttentionError(
                f"{kernel} can't serve this call",
                [Reason("holes", "holes (padding between real tokens)")],
                "Run it without torch.compile.",
            )
        call.mask = rule()
        return dense.sdpa(call)
    forward = backends.get(kernel).forward
    assert forward is not None
    return forward(call)


_NONE = torch.nn.Identity()  # in the place of the module: a kernel over spans does not look at it


def autograd_inside() -> Any:
    """Autograd inside an operator, where torch has switched its dispatch keys off."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutogradOther"):
        exclude = exclude.remove(torch._C._dispatch_key_parse(key))
    return torch._C._ForceDispatchKeyGuard(include, exclude)


@torch.library.custom_op("axattn::masked_attention", mutates_args=())
def masked_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: torch.Tensor,
    scale: float,
    softcap: float | None,
    kernel: str,
    options: str,
) -> torch.Tensor:
    """Attention of whole rows under the mask behind ``LazyMask.handle``; arguments as for `run_kernel`."""
    mask = of_handle(handle)
    return run_kernel(query, key, value, mask, scale, softcap, kernel, options, mask.dense).contiguous()


def fake_output(query: Any, key: Any, value: Any, *_: Any) -> torch.Tensor:
    """The form of what the operators of attention return."""
    B, H, S, _D = query.shape
    out: torch.Tensor = query.new_empty(B, S, H, value.shape[-1])
    return out


def fake_gradients(
    grad: Any, query: Any, key: Any, value: Any, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The form of what their backward operators return."""
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))  # type: ignore[return-value]  # a tuple of three


masked_attention_op.register_fake(fake_output)


@torch.library.custom_op("axattn::masked_attention_backward", mutates_args=())
def masked_attention_backward_op(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: torch.Tensor,
    scale: float,
    softcap: float | None,
    kernel: str,
    options: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `masked_attention_op` to query, key and value."""
    mask = of_handle(handle)
    with autograd_inside(), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out = run_kernel(q, k, v, mask, scale, softcap, kernel, options, mask.dense)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


masked_attention_backward_op.register_fake(fake_gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, handle, *ctx.rule = inputs
    ctx.save_for_backward(query, key, value, handle)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv = masked_attention_backward_op(grad, *ctx.saved_tensors, *ctx.rule)
    return dq, dk, dv, *(None,) * 5


masked_attention_op.register_autograd(_backward, setup_context=_setup)
