"""Attention sinks (gpt-oss) from a kernel's logsumexp, forward and backward: for every kernel with a `ForwardBackward`.

A sink is one more key of each head, with a learned logit and a value of zero. Without it a kernel returns ``out`` and
``lse``; with it

    out'  = out * sigmoid(lse - sink)
    lse'  = logaddexp(lse, sink)

and the kernel's own backward, fed with ``out'`` and ``lse'``, is the backward with sinks. The sink's weight is
``exp(sink - lse')``, so ``dsink = -sum exp(sink - lse') * rowsum(dout * out')``.

A query that attends to nothing keeps its output of zero and gets gradients of zero, whatever a kernel returns as its
logsumexp (torch's CPU kernel 0, FlashAttention 2 +inf).
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch

from axattn.backends import decoding, sdpa
from axattn.backends.call import AttentionCall, sink_column
from axattn.backends.varlen_engine.forward_backward import ForwardBackward, Gradients, of_torch
from axattn.masks.varlen_layout import Layout


def with_sinks(call: AttentionCall, layout: Layout, kernel: ForwardBackward) -> torch.Tensor:
    """Attention with the call's sinks, differentiable.

    Args:
        call: with sinks, without dropout and bias.
        layout: spans of its mask.
        kernel: the forward and backward of a kernel without sinks.

    Returns:
        ``[B, S, H, Dv]``; zero at queries that no span covers.
    """
    inputs = (call.query, call.key, call.value, call.sinks)
    out: torch.Tensor = _WithSinks.apply(*inputs, call, layout, kernel)  # type: ignore[no-untyped-call]  # torch's apply has no annotations
    return out


def exact_with_sinks(call: AttentionCall, layout: Layout) -> torch.Tensor:
    """`with_sinks` over torch's flash kernels; under a dense mask where they do not run, ``[B, S, H, Dv]``."""
    if call.query.shape[2] == 1:
        return decoding.single_query_attention(call, layout)
    kernel = of_torch(call)
    return sdpa.sdpa(call) if kernel is None else with_sinks(call, layout, kernel)


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        call: AttentionCall,
        layout: Layout,
        kernel: ForwardBackward,
    ) -> torch.Tensor:
        out, logsumexp = forward(call, layout, kernel)
        ctx.save_for_backward(query, key, value, sinks, out, logsumexp)
        none = query.new_empty(0)  # tensors are saved above, where hooks of offloading see them
        ctx.call = dataclasses.replace(call, query=none, key=none, value=none, sinks=None, mask=None, extras={})
        ctx.layout, ctx.kernel = layout, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, *saved = ctx.saved_tensors
        call = dataclasses.replace(ctx.call, query=query, key=key, value=value, sinks=sinks)
        gradients, of_sinks = backward(grad, call, ctx.layout, ctx.kernel, *saved)
        return *gradients, of_sinks, None, None, None


def forward(call: AttentionCall, layout: Layout, kernel: ForwardBackward) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, S, H, Dv]`` and logsumexp ``[B, H, S]`` of a kernel, with the call's sinks."""
    return joined(*kernel.forward(call, layout), _logits(call, _key_mean(call, layout, kernel)))


def backward(
    grad: torch.Tensor,
    call: AttentionCall,
    layout: Layout,
    kernel: ForwardBackward,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> tuple[Gradients, torch.Tensor]:
    """Gradients to query, key and value, and to the sinks.

    Args:
        grad: gradient of the output, ``[B, S, H, Dv]``.
        call: with sinks.
        layout: spans of its mask.
        kernel: the kernel of `forward`.
        out: what `forward` returned.
        logsumexp: what `forward` returned.
    """
    if kernel.exact is not None:
        kernel = kernel.exact
        out, logsumexp = forward(call, layout, kernel)
    dq, dk, dv = kernel.backward(grad, call, layout, out, logsumexp)
    mean = _key_mean(call, layout, kernel)
    weight = torch.exp(_logits(call, mean) - logsumexp)
    of_logits = -weight * (grad.to(weight.dtype) * out).sum(-1).transpose(1, 2)  # [B, H, S]
    if mean is not None:
        dq = (dq - call.scale * of_logits[..., None] * mean).to(dq.dtype)
    sinks = cast("torch.Tensor", call.sinks)
    of_sinks = of_logits.sum((0, 2)) if sinks.ndim == 1 else of_logits[..., None]
    return (dq, dk, dv), of_sinks.to(sinks.dtype)


def joined(out: torch.Tensor, logsumexp: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel's output and logsumexp with one more key whose value is zero; computed in float32 or wider.

    Args:
        out: ``[B, S, H, Dv]``, overwritten.
        logsumexp: ``[B, H, S]``.
        logits: of the key, ``[1 or B, H, 1 or S]``.
    """
    gate = torch.sigmoid(logsumexp - logits).transpose(1, 2)[..., None]
    return out.mul_(gate), torch.logaddexp(logsumexp, logits)


def _logits(call: AttentionCall, mean: torch.Tensor | None) -> torch.Tensor:
    """The sinks as logits ``[1 or B, H, 1 or S]``, in the frame of a kernel's logsumexp.

    A kernel that subtracts the mean from its keys lowers every logit of a query by ``scale * q . mean``. dq needs the
    same term: the columns of dS sum to zero without sinks only.
    """
    wide = torch.promote_types(call.query.dtype, torch.float32)
    logits = sink_column(cast("torch.Tensor", call.sinks), wide)[..., 0]
    return logits if mean is None else logits - call.scale * (call.query.to(wide) * mean).sum(-1)


def _key_mean(call: AttentionCall, layout: Layout, kernel: ForwardBackward) -> torch.Tensor | None:
    """The mean that a kernel subtracts from the keys of each query, float32 ``[B, H, S, D]``; None for none."""
    if kernel.key_mean is None:
        return None
    mean = kernel.key_mean(call, layout)
    return mean.repeat_interleave(call.query.shape[1] // mean.shape[1], 1)
