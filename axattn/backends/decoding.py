"""One query per row over its keys, through ``F.scaled_dot_product_attention``, which reads a cache in place.

A varlen kernel takes keys as packed tokens. Packing those of a cache copies all of them twice at every layer and step,
which takes four times as long as the attention itself.
"""

from __future__ import annotations

import torch

from axattn.backends import sdpa
from axattn.backends.call import AttentionCall
from axattn.masks.varlen_layout import Layout


def serves(call: AttentionCall) -> bool:
    """Whether `single_query_attention` takes a call; on a CPU the tiles read a cache in place."""
    return call.query.device.type != "cpu" and _is_single(call)


def _is_single(call: AttentionCall) -> bool:
    """Whether it has one query per row and needs nothing that ``F.scaled_dot_product_attention`` lacks."""
    return call.query.shape[2] == 1 and call.softcap is None and call.sinks is None and call.bias is None


def pays_on_cpu(call: AttentionCall) -> bool:
    """Whether `single_query_attention` beats tiles on a CPU: without a gradient, one call under a mask instead of one
    per row (measured: 0.5 to 0.85 of the time)."""
    single = call.query.device.type == "cpu" and _is_single(call)
    return single and not torch.is_grad_enabled() and call.query.shape[0] > 1 and call.key.shape[2] > 1


def single_query_attention(call: AttentionCall, layout: Layout) -> torch.Tensor:
    """Attention of the last token of each row.

    Args:
        call: S is 1; its mask is the one that `layout` was read from, or None.
        layout: its spans, at most one per row.

    Returns:
        ``[B, 1, H, Dv]``; zero for a row that is padding.
    """
    spans, window = layout.spans, layout.window
    if not spans:
        zero = call.query[:0].sum() + call.key[:0].sum() + call.value[:0].sum()  # with zero gradients
        if call.sinks is not None:
            zero = zero + call.sinks[:0].sum()
        return zero.expand(layout.rows, 1, call.query.shape[1], call.value.shape[-1])
    low, high = min(span.k0 for span in spans), max(span.k1 for span in spans)
    first = spans[0]
    all_rows = len(spans) == 1 and (first.row0, first.row1) == (0, layout.rows)
    if all_rows and window is not None:  # bottom-right: the query sits at the last key
        low = max(low, high - window)
    keys, values, mask = call.key[:, :, low:high], call.value[:, :, low:high], None
    if not all_rows:
        mask = call.dense_mask()[..., low:high]  # type: ignore[index]  # without a mask, one span covers all rows
    call.ran = "sdpa"
    out = sdpa.attention(call.query, keys, values, mask, call.dropout, False, call.scale, call.sinks).transpose(1, 2)
    if mask is not None and sum(span.row1 - span.row0 for span in spans) < layout.rows:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out
