"""`axattn::int8_attention`: the INT8 kernels as one torch operator, with a fake implementation and a true gradient."""

from __future__ import annotations

from typing import Any

import torch

from axattn.backends.varlen_engine.flash_backward import Packed, exact_forward, flash_backward
from axattn.kernels import int8_attention
from axattn.kernels.document_statistics import Documents


def _sm(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def block_of(query: torch.Tensor) -> int:
    """Queries per block, for ``[tokens, H, D]`` on its device."""
    return int8_attention.tuning(int8_attention.padded_size(query.shape[-1]), _sm(query.device)).block_m


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    blocks: torch.Tensor,
    keys: Documents | None,
    softcap: float,
    exact_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 attention of packed documents, differentiable.

    Args:
        query: ``[tokens, H, D]``; 16 bit, or float32 in Triton's interpreter.
        key: ``[tokens, Hkv, D]``.
        value: ``[tokens, Hkv, D]``.
        packed: the documents.
        blocks: result of `int8_attention.query_blocks` for blocks of `block_of` queries.
        keys: the documents of the keys, to subtract the mean of each; None subtracts nothing (under a softcap).
        softcap: 0 for none; it has no gradient.
        exact_backward: recompute the exact output for the gradient.

    Returns:
        Output ``[tokens, H, D]``, and the logsumexp of its logits, float32 ``[H, tokens]``, without a gradient.
    """
    mean = document = None
    if keys is not None:
        with torch.no_grad():
            mean, document = keys.mean(key), keys.document_ids
    out, logsumexp, _ = int8_attention_op(
        query,
        key,
        value,
        mean,
        document,
        packed.cu_q,
        packed.cu_k,
        blocks,
        packed.max_q,
        packed.max_k,
        packed.causal,
        packed.window,
        packed.scale,
        softcap,
        exact_backward,
    )
    return out, logsumexp


@torch.library.custom_op("axattn::int8_attention", mutates_args=())
def int8_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mean: torch.Tensor | None,
    document: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    blocks: torch.Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float,
    exact_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `attention` and `int8_attention.forward`.

    Returns:
        Output ``[tokens, H, D]``, logsumexp float32 ``[H, tokens]``, and the smoothed keys ``[tokens, Hkv, D]`` (empty
        without a mean).
    """
    query, key, value = (int8_attention.aligned_to_8(x) for x in (query, key, value))
    cut = int8_attention.tuning(int8_attention.padded_size(query.shape[-1]), _sm(query.device))
    q, k = int8_attention.quantise(query), int8_attention.quantise(key, mean, document)
    out, lse = int8_attention.forward(
        q, k, value, cu_q, cu_k, blocks, cut=cut, causal=causal, window=window, softcap=softcap, scale=scale
    )
    return out, lse, key.new_empty(0) if mean is None else k.smooth


@int8_attention_op.register_fake
def _(query: Any, key: Any, value: Any, mean: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, heads, size = query.shape
    out = value.new_empty(tokens, heads, size)
    lse = query.new_empty(heads, tokens, dtype=torch.float32)
    return out, lse, key.new_empty(0) if mean is None else key.new_empty(key.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, mean, _, cu_q, cu_k, _, max_q, max_k, causal, window, scale, softcap, exact = inputs
    out, lse, smooth = output
    if softcap:
        raise NotImplementedError("the backward has no softcap (see the capability of sage)")
    keys = key if mean is None else smooth
    ctx.save_for_backward(query, keys, value, *(() if exact else (out, lse)), cu_q, cu_k)
    ctx.packed = (max_q, max_k, causal, window, scale)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    query, key, value, *rest, cu_q, cu_k = ctx.saved_tensors
    packed = Packed(cu_q, cu_k, *ctx.packed)
    out, lse = rest or exact_forward(query, key, value, packed)
    return (*flash_backward(grad, query, key, value, out, lse, packed), *(None,) * 12)


int8_attention_op.register_autograd(_backward, setup_context=_setup)
