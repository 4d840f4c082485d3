"""``eager``: the model's own eager attention function, the exact fallback for softcap and for what no kernel serves."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.forward_ad import unpack_dual

from axattn.backends import softcap_tiles
from axattn.backends.base import TORCH_KERNEL, Backend, always_usable
from axattn.backends.by_document import by_document
from axattn.backends.call import AttentionCall
from axattn.backends.sparse_indices import SELECTIONS, only_selected, selected
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.torch_internals import is_tracing, needs_torch_operators
from axattn.hf.weak_cache import weak_cache
from axattn.masks.lazy_mask import LazyMask

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
        "S x S mask in graphs, over a cache and for masks that hold more than documents, windows and padding",
        "softcap": "on a CPU, documents and rows of 256 tokens and more run tile by tile when called by axattn, "
        "without L x L weights, unless something else needs the model's function (dropout, attention weights)",
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
    tiled = _takes_tiles(function, call)
    if _takes_documents(function, call):
        out = by_document(call, functools.partial(_tiles_or_eager if tiled else _eager, function))
        if out is not None:
            return out
    whole = _without_mask(call) if tiled and call.query.shape[2] >= softcap_tiles.SHORTEST else None
    return _eager(function, call) if whole is None or not _pays(whole) else _tiles(whole)


def _pays(call: AttentionCall) -> bool:
    return softcap_tiles.pays(call.query, call.causal)


def _tiles_or_eager(function: Callable[..., Any], call: AttentionCall) -> torch.Tensor:
    return _tiles(call) if _pays(call) else _eager(function, call)


def _tiles(call: AttentionCall) -> torch.Tensor:
    """`softcap_tiles` on a call that has a softcap and no mask, or the mask of a group of documents (`by_document`)."""
    mask = call.mask if isinstance(call.mask, torch.Tensor) and len(call.mask) > 1 else None  # for one row: no padding
    rule = softcap_tiles.Rule(call.scale, call.softcap or 0.0, call.causal, call.window, mask)
    return softcap_tiles.attention(call.query, call.key, call.value, rule)


def _takes_tiles(function: Callable[..., Any], call: AttentionCall) -> bool:
    """Whether `softcap_tiles` computes what the model's function does: its parameters are those of Gemma 2's and the
    call asks for nothing else."""
    softcap = call.softcap
    if softcap is None or not 0 < softcap <= softcap_tiles.MAX_SOFTCAP or _parameters(function) != _OF_GEMMA2:
        return False
    if call.dropout or call.want_weights or call.sinks is not None or call.bias is not None:
        return False
    if any(key in call.extras for key in SELECTIONS) or is_tracing() or needs_torch_operators():
        return False
    return all(map(_is_plain, (call.query, call.key, call.value)))


def _is_plain(x: torch.Tensor) -> bool:
    """Whether it is no subclass (a DTensor) and has no tangent of forward-mode differentiation."""
    return type(x) is torch.Tensor and unpack_dual(x).tangent is None  # type: ignore[no-untyped-call]  # torch's


_OF_GEMMA2 = frozenset({"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "softcap", "kwargs"})
"""Every model of Transformers with a softcap has this function."""


def _without_mask(call: AttentionCall) -> AttentionCall | None:
    """A call whose rows are documents from end to end, its mask as `AttentionCall.causal` and ``window``; None for any
    other mask and for queries over a cache."""
    if call.query.shape[2] != call.key.shape[2]:
        return None
    if call.mask is None:
        return call
    layout = call.mask.layout() if isinstance(call.mask, LazyMask) else None
    if layout is None or not layout.whole_rows or layout.stems:
        return None
    return dataclasses.replace(call, mask=None, causal=layout.causal, window=layout.window)


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
