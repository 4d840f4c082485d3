"""A strict stand-in for ``xformers.ops.memory_efficient_attention`` on a CPU.

The library's own classes check the inputs and say what a bias means (`materialize`); only the kernel is a plain
reference. It raises where no kernel of the library would run on Hopper in 16 bit, for which float32 stands: an unknown
bias, windows above head dim 256, and the grouped form ``[B, M, G, H, K]`` in training.
"""

from __future__ import annotations

from typing import Any

import torch
from xformers.ops.fmha import _detect_lse_packed_or_raise
from xformers.ops.fmha import attn_bias as biases
from xformers.ops.fmha.common import Inputs

calls: list[str] = []
WINDOW = biases.BlockDiagonalCausalLocalAttentionFromBottomRightMask
BOTH_WAYS = biases.LocalAttentionFromBottomRightMask
SERVED = (
    type(None),
    biases.BlockDiagonalMask,
    biases.BlockDiagonalCausalMask,
    biases.BlockDiagonalCausalFromBottomRightMask,
    WINDOW,
    BOTH_WAYS,
)
"""Biases that both the forward and the backward of its flash operator list (xformers 0.0.35, ``fmha/flash.py``)."""


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``[B, M, H, K]`` or ``[B, M, G, H, K]`` → the same shape."""
    calls.append("xformers")
    _check(query, key, value, attn_bias, p, scale, output_dtype)
    logits = _logits(query, key, attn_bias, scale)
    weights = logits.softmax(-1)
    if p:
        weights = torch.nn.functional.dropout(weights, p)
    v = value.flatten(2, -2).transpose(1, 2).float()
    return (weights @ v).transpose(1, 2).reshape(query.shape).to(query.dtype)


def memory_efficient_attention_forward_requires_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[1, M, H, K]``, and the logsumexp ``[1, H, M]`` (packed, as its flash operators return it)."""
    calls.append("xformers")
    assert not p
    _check(query, key, value, attn_bias, p, scale, None, training=True)
    logits = _logits(query, key, attn_bias, scale)
    out = logits.softmax(-1) @ value.transpose(1, 2).float()
    return out.transpose(1, 2).to(query.dtype), logits.logsumexp(-1)


def memory_efficient_attention_backward(
    grad: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the output and the logsumexp that it is given."""
    assert not p
    inputs = Inputs(query=query, key=key, value=value, p=p, attn_bias=attn_bias, scale=scale)
    assert _detect_lse_packed_or_raise(lse, inputs) is not False
    _check(query, key, value, attn_bias, p, scale, None, training=True)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, o = (x.transpose(1, 2).float() for x in (query, key, value, grad, output))
    weights = (_logits(query, key, attn_bias, scale) - lse[..., None]).exp()
    ds = weights * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * factor
    found = (ds @ k, ds.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g)
    dq, dk, dv = (x.transpose(1, 2).to(query.dtype) for x in found)
    return dq, dk, dv


def _logits(query: torch.Tensor, key: torch.Tensor, attn_bias: Any, scale: float | None) -> torch.Tensor:
    q, k = (x.flatten(2, -2).transpose(1, 2).float() for x in (query, key))
    logits = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return logits if attn_bias is None else logits + attn_bias.materialize((q.shape[2], k.shape[2]))


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any,
    p: float,
    scale: float | None,
    output_dtype: torch.dtype | None,
    training: bool = False,
) -> None:
    inputs = Inputs(query=query, key=key, value=value, p=p, attn_bias=attn_bias, scale=scale, output_dtype=output_dtype)
    inputs.validate_inputs()
    if type(attn_bias) not in SERVED:
        raise NotImplementedError(f"No operator found: attn_bias type is {type(attn_bias)}")
    training = training or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
    if query.shape[-1] > 256 and isinstance(attn_bias, BOTH_WAYS if not training else (BOTH_WAYS, WINDOW)):
        raise NotImplementedError(f"No operator found: attn_bias type is {type(attn_bias)}")
    if query.shape[-1] % 8 or query.shape[-1] != value.shape[-1]:
        raise NotImplementedError(f"No operator found: head dims {query.shape[-1]} and {value.shape[-1]}")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise NotImplementedError(f"No operator found: dtype={query.dtype}")
    if query.ndim == 5 and training:
        raise NotImplementedError("No operator found: operator does not support BMGHK format")
