"""`portable`: a call in torch's own operators, for graphs that other programs run and for the transforms of torch.func.

An exported graph has no host that reads documents and no kernel of another library; ``torch.func`` can't transform the
gradients that axattn writes by hand. Both get what Transformers' ``sdpa`` gives them, under a dense mask that keeps
documents apart.
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
    """Exact attention through ``F.scaled_dot_product_attention``, or the model's own eager function where that serves
    less (a softcap, sinks, attention weights).

    Args:
        call: any.
        planned: the backend of the layer's plan.
        layer: for errors.

    Returns:
        ``[B, S, H, Dv]``.

    Raises:
        UnsupportedAttentionError: the kernel computes something else, which nothing exact may stand in for.
    """
    if planned.capability.exactness == "lossy" and (call.module.training or planned.variant is None):
        what = "an exported graph" if is_exporting() else "a transform of torch.func"
        evaluate = ", or call model.eval()" if planned.variant is not None else ""
        raise UnsupportedAttentionError(
            f"{planned.name} can't serve {layer} in {what}",
            [Reason("exact", f"exact attention would run there, and {planned.name} computes something else")],
            f"Put \"with axattn.using(model, 'auto'):\" around it{evaluate}.",
        )
    call.mask = (
        call.dense_mask()
    )  # whether a flag says all that the mask does depends on the length, which a graph leaves open
    if call.softcap is not None or call.sinks is not None or call.want_weights:
        return eager(call)
    groups = int(call.query.shape[1]) // int(call.key.shape[1])
    if groups > 1:  # without `enable_gqa`, which exporters and vmap lack; as Transformers does it under a mask
        call.key, call.value = (repeated(x, groups) for x in (call.key, call.value))
    call.ran = "sdpa"
    return sdpa(call)
