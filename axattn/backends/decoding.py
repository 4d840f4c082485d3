"""One query a row over its keys, through ``F.scaled_dot_product_attention``: it reads keys where they lie.

A variable-length kernel wants keys as tokens without gaps. To lay those of a cache out so is to copy all of them twice
at every layer and step, four times the time of the attention itself.
"""

from __future__ import annotations

import torch

from axattn.backends import sdpa
from axattn.backends.call import AttentionCall
from axattn.masks.varlen_layout import Layout


def serves(call: AttentionCall) -> bool:
    """Whether `one_query` takes a call; on a CPU tiles read keys where they lie."""
    return call.query.device.type != "cpu" and _is_single(call)


def _is_single(call: AttentionCall) -> bool:
    """Whether it is one query a row, and nothing that ``F.scaled_dot_product_attention`` lacks is asked for."""
    return call.query.shape[2] == 1 and call.softcap is None and call.sinks is None and call.bias is None


def pays_on_cpu(call: AttentionCall) -> bool:
    """Whether `one_query` beats tiles on a CPU: without a gradient one call under a mask, in place of one a row
    (measured: 0.5 to 0.85 of the time)."""
    single = call.query.device.type == "cpu" and _is_single(call)
    return single and not torch.is_grad_enabled() and call.query.shape[0] > 1 and call.key.shape[2] > 1


def one_query(call: AttentionCall, layout: Layout) -> torch.Tensor:
    """Attention of the last token of each row.

    Args:
        call: S is 1; its mask is the one that `layout` was read off, or None.
        layout: its spans, at most one a row.

    Returns:
        ``[B, 1, H, Dv]``; zero for a row that is padding.
    """
    spans, window = layout.spans, layout.window
    if not spans:
        nothing = call.query[:0].sum() + call.key[:0].sum() + call.value[:0].sum()  # zero, and so are the gradients
        return nothing.expand(layout.rows, 1, call.query.shape[1], call.value.shape[-1])
    low, high = min(span.k0 for span in spans), max(span.k1 for span in spans)
    first = spans[0]
    everywhere = len(spans) == 1 and (first.row0, first.row1) == (0, layout.rows)
    if everywhere and window is not None:  # bottom-right: the query sits at the last key
        low = max(low, high - window)
    keys, values, mask = call.key[:, :, low:high], call.value[:, :, low:high], None
    if not everywhere:
        mask = call.dense_mask()[..., low:high]  # type: ignore[index]  # without a mask all rows are alike
    call.ran = "sdpa"
    out = sdpa.attention(call.query, keys, values, mask, call.dropout, False, call.scale).transpose(1, 2)
    if mask is not None and sum(span.row1 - span.row0 for span in spans) < layout.rows:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out
