"""Stands in for ``torch.ops.fa3_fwd.fwd`` on a CPU, so that all of fa3-fwd 0.0.3 above it is the library's own.

It refuses what the flags say that the library was built without (``fa3_fwd_config.py``) and what the checks of its
binary say; inside is `tests.fakes.flash`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.fakes import flash

_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, Tensor? out=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, "
    "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> (Tensor, Tensor, Tensor?, Tensor?)"
)
"""That of FlashAttention 3 (hopper/)."""
_library = torch.library.Library("fa3_fwd", "FRAGMENT")


def register(flags: Mapping[str, bool]) -> None:
    """Define the operator for a build with these flags."""

    def fwd(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any, None, None]:
        (k_new, v_new, q_v, out, cu_q, cu_k, cu_new, used_q, used_k, max_q, max_k, page_table, batches, leftpad) = rest[
            :14
        ]
        (_cos, _sin, _rotary, q_descale, k_descale, v_descale, scale, causal, left, right, chunk, softcap) = rest[14:26]
        given = (k_new, v_new, q_v, out, cu_new, used_q, used_k, page_table, batches, leftpad)
        assert all(x is None for x in given)
        assert not chunk
        local = (left >= 0 or right >= 0) and not (left < 0 and right == 0)
        if flags["FLASHATTENTION_DISABLE_LOCAL"] and local:
            raise RuntimeError("This flash attention build does not support local attention.")
        if flags["FLASHATTENTION_DISABLE_SOFTCAP"] and softcap:
            raise RuntimeError("This flash attention build does not support softcap.")
        if flags["FLASHATTENTION_DISABLE_FP16"] and q.dtype == torch.float16:
            raise RuntimeError("This flash attention build does not support fp16.")
        for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
            if not cu.is_contiguous():
                raise RuntimeError(f"{name} must be contiguous")
        if max_q is None or max_k is None:
            raise RuntimeError("max_seqlen_q must be provided if cu_seqlens_q is provided")
        scales, lengths = (q_descale, k_descale, v_descale), (cu_q, cu_k, max_q, max_k)
        out, lse = flash.fp8_forward(
            q, k, v, scales, lengths, scale=scale, causal=causal, window=(left, right), softcap=softcap
        )
        return out, lse, None, None

    _library.define(_SCHEMA)
    _library.impl("fwd", fwd, "CompositeExplicitAutograd")
