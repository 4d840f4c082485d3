"""A kernel over spans as one operator under a mask made outside the graph, for a layer that is compiled by itself.

`axattn.backends.compiled_ops.varlen_op` is for whole models, which make their masks inside the graph.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.backends.compiled_ops.body import OpBody, fake_gradients, fake_output, gradients, save_for_backward
from axattn.hf.tensor_snapshots import READS_ON_HOST
from axattn.masks.lazy_mask import of_handle


@torch.library.custom_op("axattn::masked_attention", mutates_args=(), tags=READS_ON_HOST)
def masked_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: torch.Tensor,
    scale: float,
    softcap: float | None,
    kernel: str,
    options: str,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of whole rows under the mask of a ``LazyMask.handle``; the other arguments are those of `OpBody`.

    Returns:
        Output ``[B, S, H, Dv]``, and what its backward needs besides.
    """
    mask = of_handle(handle)
    return OpBody(mask, scale, softcap, kernel, options, mask.dense, sinks).forward(query, key, value)


masked_attention_op.register_fake(fake_output)


@torch.library.custom_op("axattn::masked_attention_backward", mutates_args=(), tags=READS_ON_HOST)
def masked_attention_backward_op(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: torch.Tensor,
    out: torch.Tensor | None,
    logsumexp: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    kernel: str,
    options: str,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `masked_attention_op` to query, key, value and sinks (empty without sinks)."""
    mask = of_handle(handle)
    saved = None if out is None or logsumexp is None else (out, logsumexp)
    return OpBody(mask, scale, softcap, kernel, options, mask.dense, sinks).backward(grad, query, key, value, saved)


masked_attention_backward_op.register_fake(fake_gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    save_for_backward(ctx, inputs, output, tensors=4)


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return gradients(ctx, grad, masked_attention_backward_op, arguments=9)


masked_attention_op.register_autograd(_backward, setup_context=_setup)
