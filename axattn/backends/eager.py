"""``eager``: the model's own eager attention function, the exact fallback for softcap and for what no kernel serves."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from axattn.backends.base import TORCH_KERNEL, Backend, always_usable
from axattn.backends.by_document import by_document
from axattn.backends.call import AttentionCall
from axattn.backends.sparse_indices import only_selected, selected
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.weak_cache import weak_cache

CAPABILITY = dataclasses.replace(
    TORCH_KERNEL,
    devices=frozenset({"cpu", "cuda", "xpu", "mps", "npu"}),
    softcap=True,
    sinks=True,
    bias=True,
    sparse=True,
    dropout=True,
    dense_mask=True,
    weights=True,
    second_gradient=True,
    notes={
        "segments": "document by document when called by axattn, as under `auto`: L x L weights for each. One dense "
        "S x S mask in graphs, over a cache and for masks that hold more than documents, windows and padding"
    },
)


def eager_function(module: torch.nn.Module) -> Callable[..., Any] | None:
    """``eager_attention_forward`` of the file that defines the attention module, None if it has none."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]  # a module attribute has no type
    return None


_PASSED_BY_NAME = ("dropout", "scaling", "output_attentions")


def eager(call: AttentionCall) -> torch.Tensor:
    """Run the model's own eager function with an additive mask; returns ``[B, S, H, Dv]``.

    Raises:
        UnsupportedAttentionError: the model's file has no ``eager_attention_forward``.
    """
    function = eager_function(call.module)
    if function is None:
        raise UnsupportedAttentionError(
            f"{type(call.module).__name__} has no eager attention function to fall back to",
            [Reason("model", f"{type(call.module).__module__} defines no eager_attention_forward")],
        )
    call.ran = "eager"
    if _takes_documents(function, call):
        out = by_document(call, functools.partial(_eager, function))
        if out is not None:
            return out
    return _eager(function, call)


def _eager(function: Callable[..., Any], call: AttentionCall) -> torch.Tensor:
    mask, kept = call.dense_mask(), selected(call)
    if kept is not None:  # eager functions ignore the keywords of the selected keys
        mask = only_selected(mask, kept)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(call.query.dtype).min
        mask = torch.zeros_like(mask, dtype=call.query.dtype).masked_fill_(~mask, lowest)
    out: torch.Tensor
    out, weights = function(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scale,
        **{key: value for key, value in call.extras.items() if key not in _PASSED_BY_NAME},
    )
    if call.want_weights:
        call.weights = weights
    return out


_CUT = frozenset({"position_bias", "sinks", "s_aux"})
"""Tensors that `by_document` passes to an eager function as each document needs them."""


def _takes_documents(function: Callable[..., Any], call: AttentionCall) -> bool:
    """Whether documents may be its rows: no tensor of the whole rows reaches a parameter (``**kwargs`` are unused)."""
    given = {key for key, x in call.extras.items() if isinstance(x, torch.Tensor)} - _CUT
    return not given & _parameters(function)


@weak_cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


BACKENDS = (Backend("eager", "the model's own eager function", CAPABILITY, always_usable, eager),)
