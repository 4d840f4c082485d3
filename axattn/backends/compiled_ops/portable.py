"""`portable`: a call in torch's own operators, for exported graphs and for the transforms of ``torch.func``.

An exported graph can't read documents on the host or call another library's kernel; ``torch.func`` can't transform
axattn's hand-written gradients. Both run what Transformers' ``sdpa`` runs, under a dense mask that keeps documents
apart.
"""

from __future__ import annotations

import torch

from axattn.backends.base import Backend
from axattn.backends.call import AttentionCall
from axattn.backends.eager import eager
from axattn.backends.sdpa import repeated, sdpa
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.torch_internals import is_exporting


def portable(call: AttentionCall, planned: Backend, layer: str) -> torch.Tensor:
    """Exact attention through ``F.scaled_dot_product_attention``, or the model's own eager function for what that
    lacks (a softcap, sinks, attention weights).

    Args:
        call: any.
        planned: the backend of the layer's plan.
        layer: for errors.

    Returns:
        ``[B, S, H, Dv]``.

    Raises:
        UnsupportedAttentionError: the planned kernel is lossy, and no exact one may replace it.
    """
    if planned.capability.exactness == "lossy" and (call.module.training or planned.variant is None):
        what = "an exported graph" if is_exporting() else "a transform of torch.func"
        evaluate = ", or call model.eval()" if planned.variant is not None else ""
        raise UnsupportedAttentionError(
            f"{planned.name} can't serve {layer} in {what}",
            [Reason("exact", f"exact attention would run there, and {planned.name} is not exact")],
            f"Put \"with axattn.using(model, 'auto'):\" around it{evaluate}.",
        )
    # dense, no flag: whether a flag can replace the mask depends on the length, which is symbolic in a graph
    call.mask = call.dense_mask()
    if call.softcap is not None or call.sinks is not None or call.want_weights:
        return eager(call)
    groups = int(call.query.shape[1]) // int(call.key.shape[1])
    if groups > 1:  # exporters and vmap lack `enable_gqa`; Transformers repeats them under a mask too
        call.key, call.value = (repeated(x, groups) for x in (call.key, call.value))
    call.ran = "sdpa"
    return sdpa(call)
