"""A true gradient for a quantised forward: flash attention's backward, with the quantised kernel's output.

Softmax does not change if one vector is subtracted from all keys of a document, so the quantised kernels run on K minus
its mean. Backward then needs that K, their output and their logsumexp: measured with INT8 and keys far from zero, dq,
dk and dv are 0.7-0.8 % off the exact gradient (9.8 % with the raw K and a corrected logsumexp). ``backward="exact"``
recomputes output and logsumexp in 16 bit, and the gradient is the exact kernel's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from axattn.backends.varlen_engine import packed_on_cpu
from axattn.hf import torch_internals
from axattn.spec.options import Option, one_of

BACKWARD = Option(
    "backward",
    "flash",
    '"flash": from the quantised output; "exact": from an output that is recomputed in 16 bit',
    one_of("flash", "exact"),
)


class Packed(NamedTuple):
    """cu_seqlens and settings of packed sequences, as flash kernels take them.

    Attributes:
        cu_q: int32 ``[documents + 1]``.
        cu_k: int32 ``[documents + 1]``.
        max_q: longest sequence of queries.
        max_k: longest sequence of keys.
        causal: causal mask, aligned bottom-right.
        window: as in `Layout`.
        scale: factor on the logits.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    causal: bool
    window: int | None
    scale: float

    @property
    def window_size(self) -> tuple[int, int]:
        """Flash attention's ``window_size``: keys attended to left and right of a query's own, -1 for all."""
        left = -1 if self.window is None else self.window - 1
        return left, (0 if self.causal else left)


def exact_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[tokens, H, D]`` and logsumexp ``[H, tokens]`` of exact attention over ``[tokens, H, D]``."""
    if query.device.type == "cpu":
        return packed_on_cpu.forward(query, key, value, packed)
    ends, longest = (packed.cu_q, packed.cu_k), (packed.max_q, packed.max_k)
    return torch_internals.flash_forward(query, key, value, ends, longest, packed.scale, packed.window_size)


def flash_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    packed: Packed,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of packed attention with respect to query, key and value.

    Args:
        grad: gradient of the output, ``[tokens, H, D]``.
        query: ``[tokens, H, D]``, 16 bit on CUDA.
        key: ``[tokens, Hkv, D]``, smoothed if the forward smoothed it.
        value: ``[tokens, Hkv, D]``.
        out: output of the forward, ``[tokens, H, D]``.
        logsumexp: float32 ``[H, tokens]`` of the forward's own logits.
        packed: the sequences.
    """
    if query.device.type == "cpu":
        return packed_on_cpu.backward(grad, query, key, value, out, logsumexp, packed)
    ends, longest = (packed.cu_q, packed.cu_k), (packed.max_q, packed.max_k)
    return torch_internals.flash_backward(
        grad.contiguous(), query, key, value, out, logsumexp, ends, longest, packed.scale, packed.window_size
    )
