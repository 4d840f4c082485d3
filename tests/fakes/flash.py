"""Strict stand-ins for FlashAttention 2, 3 and 4 on a CPU: the libraries' signatures, a plain reference inside.

They raise on everything that the real kernels can't do, so an adapter that asks for too much fails here as it would on
a GPU. One thing is looser: float32 is served when `sharp` says so, because in 16 bit a dropped feature could hide in
the rounding. Signatures: flash-attn 2.8.3 and flash_attn_interface (hopper/) 3.0.0, flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_sharp = False
calls: list[str] = []
"""Names of the kernels called, in order."""


@contextlib.contextmanager
def sharp() -> Iterator[None]:
    """Serve float32 as well."""
    global _sharp
    _sharp = True
    try:
        yield
    finally:
        _sharp = False


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, same_value_dim: bool = True) -> None:
    served = (torch.float16, torch.bfloat16, *((torch.float32,) if _sharp else ()))
    if q.dtype not in served:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query, key and value must have the same dtype")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256, and multiples of 8")
    if q.shape[-1] != k.shape[-1] or (same_value_dim and v.shape[-1] != q.shape[-1]):
        raise RuntimeError("query, key and value must have the same head dimension")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")


def _one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    dropout: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sequence: ``q [S, H, D]``, ``k [T, Hkv, D]`` → ``[S, H, Dv]``; masks aligned bottom-right, fp32 inside."""
    S, H, D = q.shape
    T = k.shape[0]
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("shd,thd->hst", q.float(), k.float()) * (D**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    rows = torch.arange(S)[:, None] + T - S
    columns = torch.arange(T)
    seen = torch.ones(S, T, dtype=torch.bool)
    left, right = window
    if causal:
        right = 0
    if left >= 0:
        seen &= columns >= rows - left
    if right >= 0:
        seen &= columns <= rows + right
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(H, S, 1)], -1)
    weights = logits.softmax(-1)
    weights = (weights[..., :T] if sinks is not None else weights).masked_fill(~seen.any(-1)[:, None], 0.0)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("hst,thd->shd", weights, v.float()).to(q.dtype)


def _varlen(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, **options: Any) -> torch.Tensor:
    for cu, x in ((cu_q, q), (cu_k, k)):
        if cu.dtype != torch.int32 or cu.ndim != 1:
            raise RuntimeError("cu_seqlens must have dtype int32")
        if int(cu[-1]) > x.shape[0]:
            raise RuntimeError("cu_seqlens reach past the tokens: out-of-bounds memory access")
    if int((cu_q[1:] - cu_q[:-1]).max()) > int(max_q) or int((cu_k[1:] - cu_k[:-1]).max()) > int(max_k):
        raise RuntimeError("a sequence is longer than max_seqlen: its end would not be computed")
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    edges_q, edges_k = cu_q.tolist(), cu_k.tolist()
    parts = [
        _one(q[a:b], k[c:d], v[c:d], **options)
        for a, b, c, d in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False)
    ]
    done = torch.cat(parts)
    return torch.cat([done, out[done.shape[0] :]])


class FlashAttention2:
    """``flash_attn`` 2.8.3."""

    __version__ = "2.8.3"

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> torch.Tensor:
        """``[B, S, H, D]`` → ``[B, S, H, D]``."""
        calls.append("flash_attention_2")
        _check(q, k, v)
        options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        return torch.stack([_one(a, b, c, dropout=dropout_p, **options) for a, b, c in zip(q, k, v, strict=True)])

    @staticmethod
    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> torch.Tensor:
        """``[tokens, H, D]`` → ``[tokens, H, D]``."""
        calls.append("flash_attention_2")
        _check(q, k, v)
        options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return _varlen(q, k, v, *lengths, dropout=dropout_p, **options)

    @staticmethod
    def flash_attn_with_kvcache(*_: Any, **__: Any) -> Any:
        """Paged inference: not used by any test."""
        raise NotImplementedError


class FlashAttention3:
    """``flash_attn_interface`` 3.0.0: no dropout."""

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        softmax_scale: float | None = None,
        causal: bool = False,
        qv: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> torch.Tensor:
        """``[B, S, H, D]`` → ``[B, S, H, D]``."""
        calls.append("flash_attention_3")
        _check(q, k, v)
        options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        return torch.stack([_one(a, b, c, **options) for a, b, c in zip(q, k, v, strict=True)])

    @staticmethod
    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        seqused_q: Any = None,
        seqused_k: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        qv: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> torch.Tensor:
        """``[tokens, H, D]`` → ``[tokens, H, D]``."""
        calls.append("flash_attention_3")
        _check(q, k, v)
        options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    @staticmethod
    def flash_attn_with_kvcache(*_: Any, **__: Any) -> Any:
        """Paged inference: not used by any test."""
        raise NotImplementedError


class FlashAttention4:
    """``flash_attn.cute`` 4.0.0b36: ``(out, lse)`` always, int maxima, None for no window side, sinks, no dropout."""

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Any = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """``[B, S, H, D]`` → ``([B, S, H, D], lse)``."""
        calls.append("flash_attention_4")
        options = _options_4(q, k, v, softmax_scale, causal, window_size, learnable_sink, softcap)
        return torch.stack([_one(a, b, c, **options) for a, b, c in zip(q, k, v, strict=True)]), None

    @staticmethod
    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        page_table: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Any = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """``[tokens, H, D]`` → ``([tokens, H, D], lse)``."""
        calls.append("flash_attention_4")
        if not isinstance(max_seqlen_q, int) or not isinstance(max_seqlen_k, int):
            raise TypeError("max_seqlen must be an int")
        options = _options_4(q, k, v, softmax_scale, causal, window_size, learnable_sink, softcap)
        return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options), None


def _options_4(
    q: Any, k: Any, v: Any, scale: Any, causal: bool, window: tuple[int | None, int | None], sinks: Any, softcap: float
) -> dict[str, Any]:
    _check(q, k, v)
    if sinks is not None and sinks.dtype != torch.bfloat16 and not _sharp:
        raise TypeError("learnable_sink must be bfloat16")
    sides = tuple(-1 if side is None else side for side in window)
    return {"scale": scale, "causal": causal, "window": sides, "softcap": softcap, "sinks": sinks}
