"""A strict stand-in for ``xformers.ops.memory_efficient_attention`` on a CPU.

The library's own classes check the inputs and say what a bias means (`materialize`); only the kernel is a plain
reference. It raises where no kernel of the library would run on Hopper in 16 bit, for which float32 stands: an unknown
bias, windows above head dim 256, and the grouped form ``[B, M, G, H, K]`` in training.
"""

from __future__ import annotations

from typing import Any

import torch
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
    inputs = Inputs(query=query, key=key, value=value, p=p, attn_bias=attn_bias, scale=scale, output_dtype=output_dtype)
    inputs.validate_inputs()
    if type(attn_bias) not in SERVED:
        raise NotImplementedError(f"No operator found: attn_bias type is {type(attn_bias)}")
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.shape[-1] > 256 and isinstance(attn_bias, BOTH_WAYS if not training else (BOTH_WAYS, WINDOW)):
        raise NotImplementedError(f"No operator found: attn_bias type is {type(attn_bias)}")
    if query.shape[-1] % 8 or query.shape[-1] != value.shape[-1]:
        raise NotImplementedError(f"No operator found: head dims {query.shape[-1]} and {value.shape[-1]}")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise NotImplementedError(f"No operator found: dtype={query.dtype}")
    if query.ndim == 5 and training:
        raise NotImplementedError("No operator found: operator does not support BMGHK format")
    q, k, v = (x.flatten(2, -2).transpose(1, 2).float() for x in (query, key, value))
    logits = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_bias is not None:
        logits = logits + attn_bias.materialize((q.shape[2], k.shape[2]))
    weights = logits.softmax(-1)
    if p:
        weights = torch.nn.functional.dropout(weights, p)
    return (weights @ v).transpose(1, 2).reshape(query.shape).to(query.dtype)
