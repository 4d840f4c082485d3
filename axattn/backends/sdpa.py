"""``sdpa``: torch's ``scaled_dot_product_attention``, by document or with a dense mask; exact for every mask."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import torch.nn.functional as F

from axattn.backends.base import TORCH_KERNEL, Backend, always_usable, keep_nan
from axattn.backends.by_document import by_document
from axattn.backends.call import AttentionCall, sink_column
from axattn.backends.sparse_indices import only_selected, selected
from axattn.hf.torch_sdpa import avoids_cudnn, takes_grouped_heads, without_cudnn
from axattn.machine.environment import Environment
from axattn.masks.lazy_mask import LazyMask
from axattn.spec.capability import Capability

CAPABILITY = dataclasses.replace(
    TORCH_KERNEL,
    devices=frozenset({"cpu", "cuda", "xpu", "mps"}),
    bias=True,
    dropout=True,
    dense_mask=True,
    sparse=True,
    second_gradient=True,
    notes={
        "segments": "document by document when called by axattn, as under `auto`. One dense S x S mask in graphs, over "
        "a cache and for masks that hold more than documents, windows and padding",
        "sinks": "called by axattn, as one more key",
        "second_gradient": "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); torch raises for its other kernels",
        "cuDNN": "on Hopper and Blackwell torch 2.11 prefers its kernel, which plans every new length anew (0.15 to "
        "0.5 s: FunASR#3704). axattn never runs it with a mask or a single query, nor on Hopper for a bidirectional "
        "call in training of a length for which its gradients can be NaN (pytorch#196678, trl#7181, "
        "cudnn-frontend#628, #1072). Other whole rows run on it, which pays if lengths repeat; if they vary, call "
        "torch.backends.cuda.enable_cudnn_sdp(False). Asked for by name, `sdpa` is Transformers' function: there that "
        "line avoids the NaN too",
    },
)


def sdpa(call: AttentionCall) -> torch.Tensor:
    """Attention through ``F.scaled_dot_product_attention``; returns ``[B, S, H, Dv]``."""
    out = by_document(call, _sdpa)
    if out is None:
        return _sdpa(call)
    call.ran = "sdpa"
    return out


def _sdpa(call: AttentionCall) -> torch.Tensor:
    flag = call.mask.as_flag if isinstance(call.mask, LazyMask) else None
    query, key, value = call.query, call.key, call.value
    kept = selected(call)
    if kept is not None:
        mask, causal = _with_bias(only_selected(call.dense_mask(), kept), call.bias, query.dtype), False
    elif call.bias is None and flag is not None:
        mask, causal = None, flag == "causal"
    elif call.bias is None and call.mask is None and call.window is None:
        mask, causal = None, call.causal and bool(query.shape[2] > 1)
    else:
        mask, causal = _with_bias(call.dense_mask(), call.bias, query.dtype), False
    if mask is not None or call.dropout or call.sinks is not None:
        call.ran = "sdpa"  # a backend that passes on whole rows without dropout is counted itself
    out = attention(query, key, value, mask, call.dropout, causal, call.scale, call.sinks)
    return keep_nan(out.transpose(1, 2), query)


def notice(environment: Environment) -> str:
    """The warning if ``F.scaled_dot_product_attention`` has only its MATH kernel: S x S in memory."""
    if environment.device != "rocm" or environment.torch_flash:
        return ""
    if environment.torch_flash is None:
        known = "other than gfx90a, gfx942 and gfx950 (from torch 2.13 on gfx1100 and gfx1201 too)"
        return f"on AMD GPUs {known} torch runs its MATH kernel, S x S in memory, unless {_EXPERIMENTAL} is set"
    text = f"torch's flash kernel does not run on {environment.gfx}, so its MATH kernel runs: S x S in memory"
    return f"{text}. {_EXPERIMENTAL}, set before Python starts, fixes it if torch's AOTriton supports this GPU"


_EXPERIMENTAL = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1"


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``F.scaled_dot_product_attention``, with grouped heads in a form that one of torch's fused kernels takes.

    With a single query, the heads of a group become query rows: a view, and no key is read twice (on a CPU 1.5 to 30
    times as fast as ``enable_gqa``, benchmarks/NOTES.md). With several, the KV heads are repeated if no fused kernel
    takes fewer of them: ``enable_gqa`` would run the MATH kernel, S x S in float32. Transformers' ``sdpa`` does both
    under a mask, and repeats heads for head dims above 256.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, Dv]``.
        mask: ``[B|1, H|1, S|1, T]`` (bool: True attends; float: added), or None.
        dropout: probability of attention dropout.
        causal: a query attends to no later key, aligned top-left.
        scale: factor on the logits, None for ``D ** -0.5``.
        sinks: ``[H]`` or ``[B, H, S, 1]``, or None. A single query is computed with its logits, which copies no key;
            for several, the sinks are one more key.

    Returns:
        ``[B, H, S, Dv]``.
    """
    B, heads, S, D = query.shape
    if sinks is not None:
        if S == 1 and not (causal and key.shape[2] > 1):
            return _single_query_with_sinks(query, key, value, mask, dropout, scale, sinks)
        key, value, mask = _with_sink_key(query, key, value, mask, causal, sinks)
        causal = False
    kv_heads, keys = key.shape[1], key.shape[2]
    groups, enable_gqa, heads_as_rows = heads // kv_heads, False, False
    if groups > 1:
        heads_as_rows = S == 1 and not (causal and keys > 1)  # top-left: the query attends to the first key only
        if heads_as_rows:
            query, causal = query.reshape(B, kv_heads, groups, D), False
            if mask is not None and mask.shape[1] > 1:
                mask = mask.reshape(mask.shape[0], kv_heads, groups, keys)
        elif takes_grouped_heads(query, key, value, mask, dropout, causal):
            enable_gqa = True
        else:
            key, value = repeated(key, groups), repeated(value, groups)
    training, masked = torch.is_grad_enabled(), mask is not None
    avoid_cudnn = avoids_cudnn(query.device, keys, masked=masked, single=S == 1, causal=causal, training=training)
    with without_cudnn() if avoid_cudnn else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=enable_gqa
        )
    return out.reshape(B, heads, S, value.shape[-1]) if heads_as_rows else out


def _single_query_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """`attention` of one query per row, softmax in float32."""
    B, heads, _, D = query.shape
    kv_heads = key.shape[1]
    grouped = (query * (D**-0.5 if scale is None else scale)).reshape(B, kv_heads, heads // kv_heads, D)
    logits = (grouped @ key.transpose(-1, -2)).reshape(B, heads, 1, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    column = sink_column(sinks, logits.dtype).expand(B, heads, 1, 1)
    weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    weights = F.dropout(weights, dropout) if dropout else weights
    out = weights.to(value.dtype).reshape(B, kv_heads, heads // kv_heads, -1) @ value
    return out.reshape(B, heads, 1, -1)


def _with_sink_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    sinks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key, value and additive mask ``[B|1, H, S, T + 1]`` with one more key of zeros, whose bias is the sink."""
    heads, S, keys = query.shape[1], query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, S, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril() if causal else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    column = sink_column(sinks, query.dtype)
    rows = max(mask.shape[0], column.shape[0])
    mask = torch.cat([mask.to(query.dtype).expand(rows, heads, S, -1), column.expand(rows, heads, S, 1)], -1)
    return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), mask


def repeated(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[B, Hkv, T, D]`` as ``[B, H, T, D]``."""
    B, heads, T, D = x.shape
    return x[:, :, None].expand(B, heads, groups, T, D).reshape(B, heads * groups, T, D)


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    if bias is None or mask is None:
        return mask if bias is None else bias.to(dtype)
    bias = bias.to(dtype)
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(dtype).min)
    return bias + mask


def native_note(environment: Environment) -> str:
    """A plan's note if Transformers' own ``sdpa`` runs on a machine; ``""`` for none."""
    if environment.sm != 90 or not environment.has("torch", "2.11"):
        return ""
    return (
        "sdpa is Transformers' own: in training on Hopper torch runs masked calls on cuDNN, whose gradients may be NaN "
        '(pytorch#196678). Use "auto", which avoids it, or torch.backends.cuda.enable_cudnn_sdp(False)'
    )


def _called(served: Capability, _: Environment) -> Capability:
    """Transformers' own ``sdpa`` ignores sinks."""
    return dataclasses.replace(served, sinks=True)


BACKENDS = (
    Backend(
        "sdpa",
        "torch scaled_dot_product_attention",
        CAPABILITY,
        always_usable,
        sdpa,
        is_sdpa=True,
        notice=notice,
        direct=_called,
    ),
)
