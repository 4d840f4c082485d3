"""``sdpa``: torch's ``scaled_dot_product_attention`` with a dense mask; exact for every mask that is a tensor."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from axattn.backends.base import TORCH_KERNEL, Backend, always_usable, keep_nan
from axattn.backends.selection import only_selected, selected
from axattn.call import AttentionCall
from axattn.environment import Environment
from axattn.masks import LazyMask

CAPABILITY = dataclasses.replace(
    TORCH_KERNEL,
    devices=frozenset({"cpu", "cuda", "xpu", "mps"}),
    bias=True,
    dropout=True,
    dense_mask=True,
    sparse=True,
    second_gradient=True,
    notes={
        "segments": "through a dense S x S mask when called by axattn, as under `auto`",
        "second_gradient": "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); torch raises for its other kernels",
    },
)


def sdpa(call: AttentionCall) -> torch.Tensor:
    """Attention through ``F.scaled_dot_product_attention``; returns ``[B, S, H, Dv]``."""
    plain = call.mask.plain if isinstance(call.mask, LazyMask) else None
    query, key, value = call.query, call.key, call.value
    kept = selected(call)
    if kept is not None:
        mask, causal = _with_bias(only_selected(call.dense_mask(), kept), call.bias, query.dtype), False
    elif call.bias is None and plain is not None:
        mask, causal = None, plain == "causal"
    elif call.bias is None and call.mask is None and call.window is None:
        mask, causal = None, call.causal and bool(query.shape[2] > 1)
    else:
        mask, causal = _with_bias(call.dense_mask(), call.bias, query.dtype), False
    if mask is not None or call.dropout:
        call.ran = "sdpa"  # whoever handed it on; whole rows without either run so under the names of others
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=causal,
        scale=call.scale,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )
    return keep_nan(out.transpose(1, 2), query)


def notice(environment: Environment) -> str:
    """What to say where ``F.scaled_dot_product_attention`` has no kernel but its MATH one: S x S in memory."""
    if environment.device != "rocm" or environment.torch_flash:
        return ""
    if environment.torch_flash is None:
        known = "other than gfx90a, gfx942 and gfx950 (from torch 2.13 on gfx1100 and gfx1201 too)"
        return f"on AMD GPUs {known} torch runs its MATH kernel, S x S in memory, unless {_EXPERIMENTAL} is set"
    text = f"torch's flash kernel does not run on {environment.gfx}, its MATH kernel does: S x S in memory"
    return f"{text}. {_EXPERIMENTAL}, set before Python starts, mends it where torch's AOTriton knows this GPU"


_EXPERIMENTAL = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1"


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    if bias is None or mask is None:
        return mask if bias is None else bias.to(dtype)
    bias = bias.to(dtype)
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(dtype).min)
    return bias + mask


BACKENDS = (
    Backend("sdpa", "torch scaled_dot_product_attention", CAPABILITY, always_usable, sdpa, plain=True, notice=notice),
)
