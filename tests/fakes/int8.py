"""axattn's INT8 kernels without their rounding: what is left is the adapter's own doing. In plain torch, any dtype."""

from __future__ import annotations

from typing import Any

import torch

from axattn.kernels.int8_attention import Rounded, Tuning, query_blocks
from tests.fakes import flash

calls: list[str] = []
"""A name for each call of the forward."""


def quantise(x: torch.Tensor, mean: torch.Tensor | None = None, document: torch.Tensor | None = None) -> Rounded:
    """Nothing is rounded; the mean is taken away."""
    if x.stride(-1) != 1:
        raise RuntimeError("the last dimension must be contiguous")
    if (mean is None) != (document is None):
        raise RuntimeError("a mean needs the documents of the tokens")
    smooth = x if mean is None or document is None else (x.float() - mean[document.long()]).to(x.dtype)
    return Rounded(smooth, torch.ones(x.shape[1], x.shape[0]), smooth if mean is None else smooth.clone())


def forward(
    q: Rounded,
    k: Rounded,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    blocks: torch.Tensor,
    *,
    cut: Tuning,
    causal: bool,
    window: int | None,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernel, but exact; the blocks must be those of the documents."""
    calls.append("sage")
    lengths = tuple((cu_q[1:] - cu_q[:-1]).tolist())
    if not torch.equal(blocks, query_blocks(lengths, cut.block_m, blocks.device)):
        raise RuntimeError("blocks that are not those of the documents: some queries would not be computed")
    left = -1 if window is None else window - 1
    outs, lses = [], []
    for a, b, c, d in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False):
        options: dict[str, Any] = {"scale": scale, "causal": causal, "softcap": softcap}
        out, lse = flash._with_logsumexp(
            q.values[a:b], k.values[c:d], value[c:d], window=(left, -1 if causal else left), **options
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs).to(value.dtype), torch.cat(lses, 1)
