"""axattn's fp8 quantiser in plain torch: the oracle of the kernels, and what runs on pretended GPUs."""

from __future__ import annotations

import torch

from axattn.backends.varlen_engine import per_document as statistics
from axattn.kernels.document_statistics import Documents
from tests.fakes import torchao

calls: list[str] = []
"""A name for each call."""


def quantise(x: torch.Tensor, documents: Documents, kv_heads: int) -> torchao.Fp8:
    calls.append("quantise")
    return _quantise(x, documents, kv_heads)


def quantise_smoothed(key: torch.Tensor, keys: Documents) -> tuple[torchao.Fp8, torch.Tensor]:
    calls.append("quantise_smoothed")
    smooth = statistics.smoothed(key, keys)
    return _quantise(smooth, keys, key.shape[1]), smooth


def smoothed(key: torch.Tensor, keys: Documents) -> torch.Tensor:
    calls.append("smoothed")
    return statistics.smoothed(key, keys)


def _quantise(x: torch.Tensor, documents: Documents, kv_heads: int) -> torchao.Fp8:
    if sum(documents.lengths) != x.shape[0] or x.shape[1] % kv_heads:
        raise RuntimeError("tokens in no document, or heads in no group")
    group = x.shape[1] // kv_heads
    peak = torch.stack([part.float().abs().amax((0, 2)) for part in x.split(documents.lengths)])
    scale, undo = torchao.scales(peak.unflatten(1, (kv_heads, group)).amax(-1))
    per_token = documents.spread(scale).repeat_interleave(group, 1)
    return torchao.Fp8((x.float() * per_token[..., None]).to(torchao.STORAGE), undo)
