"""Strict stand-ins for FlashAttention 2, 3 and 4 on a CPU: the libraries' signatures, a plain reference inside.

They raise on everything that the real kernels can't do, so an adapter that asks for too much fails here as it would on
a GPU. One thing is looser: float32 is served when `sharp` says so, because in 16 bit a dropped feature could hide in
the rounding. Signatures: flash-attn 2.8.3 and flash_attn_interface (hopper/) 3.0.0, flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

_sharp = False
calls: list[str] = []
"""Names of the kernels called, in order."""
repeats: list[bool] = []
"""The ``deterministic`` of each call of FlashAttention 2, 3 and 4."""


@contextlib.contextmanager
def sharp() -> Iterator[None]:
    """Serve float32 as well."""
    global _sharp
    _sharp = True
    try:
        yield
    finally:
        _sharp = False


def is_sharp() -> bool:
    """Whether float32 is served."""
    return _sharp


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
    return _with_logsumexp(q, k, v, scale, causal, window, softcap, dropout, sinks)[0].to(q.dtype)


@torch.autocast("cpu", enabled=False)  # it does not reach into a kernel
def _with_logsumexp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    dropout: float = 0.0,
    sinks: torch.Tensor | None = None,
    *,
    fp8: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_one` in fp32, and the logsumexp ``[H, S]``; `fp8`: the weights are rounded too, as the kernel does."""
    S, H, D = q.shape
    T = k.shape[0]
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("shd,thd->hst", q.float(), k.float()) * (D**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    rows = torch.arange(S, device=q.device)[:, None] + T - S
    columns = torch.arange(T, device=q.device)
    seen = torch.ones(S, T, dtype=torch.bool, device=q.device)
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
    if fp8:  # unnormalised weights in e4m3, scaled by 2^8 to use its range
        peak = logits.amax(-1, keepdim=True).clamp(min=-1e30)
        weights = ((logits - peak).exp() * 256).to(torch.float8_e4m3fn).float() / 256
        weights = weights / (logits - peak).exp().sum(-1, keepdim=True)
    else:
        weights = logits.softmax(-1)
    weights = (weights[..., :T] if sinks is not None else weights).masked_fill(~seen.any(-1)[:, None], 0.0)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("hst,thd->shd", weights, v.float()), logits.logsumexp(-1)


def _lengths(cu_q: Any, cu_k: Any, q: Any, k: Any, max_q: Any, max_k: Any) -> None:
    for cu, x in ((cu_q, q), (cu_k, k)):
        if cu.dtype != torch.int32 or cu.ndim != 1:
            raise RuntimeError("cu_seqlens must have dtype int32")
        if int(cu[-1]) > x.shape[0]:
            raise RuntimeError("cu_seqlens reach past the tokens: out-of-bounds memory access")
    if int((cu_q[1:] - cu_q[:-1]).max()) > int(max_q) or int((cu_k[1:] - cu_k[:-1]).max()) > int(max_k):
        raise RuntimeError("a sequence is longer than max_seqlen: its end would not be computed")


def _varlen(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, **options: Any) -> torch.Tensor:
    _lengths(cu_q, cu_k, q, k, max_q, max_k)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    edges_q, edges_k = cu_q.tolist(), cu_k.tolist()
    parts = [
        _one(q[a:b], k[c:d], v[c:d], **options)
        for a, b, c, d in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False)
    ]
    done = torch.cat(parts)
    return torch.cat([done, out[done.shape[0] :]])


def _pair_forward(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``[tokens, H, D]``, and the logsumexp ``[H, tokens]``: +inf where a query sees nothing."""
    ends = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    parts = [_with_logsumexp(q[a:b], k[c:d], v[c:d], **options) for (a, b), (c, d) in ends]
    lse = torch.cat([part[1] for part in parts], 1)
    return torch.cat([part[0] for part in parts]).to(q.dtype), lse.masked_fill(lse == float("-inf"), float("inf"))


@torch.autocast("cpu", enabled=False)
def _pair_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_q: Any, cu_k: Any,
    scale: float, causal: bool, window: tuple[int, int], softcap: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients from the output and the logsumexp that it is given, as the kernel does it, fp32 inside."""
    group, dq, dk, dv = q.shape[1] // k.shape[1], *(torch.zeros_like(x) for x in (q, k, v))
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        wide_k, wide_v = (x[c:d].float().repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("shd,thd->hst", q[a:b].float(), wide_k) * scale
        capped = softcap * torch.tanh(logits / softcap) if softcap else logits
        rows, columns = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        left, right = window[0], 0 if causal else window[1]
        seen = (left < 0) | (columns >= rows - left)
        seen = seen & ((right < 0) | (columns <= rows + right))
        weights = (capped - lse[:, a:b, None]).exp().masked_fill(~seen, 0.0)
        given = grad[a:b].float()
        ds = torch.einsum("shd,thd->hst", given, wide_v) - (given * out[a:b].float()).sum(-1).T[..., None]
        ds = weights * ds * ((1 - (capped / softcap) ** 2) if softcap else 1.0)
        dq[a:b] = (torch.einsum("hst,thd->shd", ds, wide_k) * scale).to(dq.dtype)
        wide = torch.einsum("hst,shd->thd", ds, q[a:b].float()) * scale, torch.einsum("hst,shd->thd", weights, given)
        for target, found in zip((dk, dv), wide, strict=True):
            target[c:d] = found.view(d - c, -1, group, found.shape[-1]).sum(2).to(target.dtype)
    return dq, dk, dv


def _flash_attn_varlen_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, dq: Any, dk: Any, dv: Any,
    cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
    causal: bool, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Any, deterministic: bool,
    rng_state: Any = None, zero_tensors: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Of FlashAttention 2: fills the gradients that it is given."""
    assert not dropout_p
    assert alibi_slopes is None
    rule = (softmax_scale, causal, (window_size_left, window_size_right), softcap, deterministic)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _fill(dout, q, k, v, out, softmax_lse, (dq, dk, dv), lengths, *rule)


def _fill(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, targets: Any, lengths: Any, scale: float, causal: bool,
    window: tuple[int, int], softcap: float, deterministic: bool,
) -> torch.Tensor:  # fmt: skip
    if lse.shape != (q.shape[1], q.shape[0]) or lse.dtype != torch.float32:
        raise RuntimeError("softmax_lse must be float32 [H, tokens]")
    if not lse.is_contiguous():
        raise RuntimeError("softmax_lse must be contiguous")
    repeats.append(deterministic)
    _lengths(*lengths[:2], q, k, *lengths[2:])
    found = _pair_backward(dout, q, k, v, out, lse, *lengths[:2], scale, causal, window, softcap)
    for target, grad in zip(targets, found, strict=True):
        target.copy_(grad)
    return lse.new_empty(0)


def _flash_attn_forward(
    q: Any, k: Any, v: Any, k_new: Any, v_new: Any, qv: Any, out: Any, cu_seqlens_q: Any, cu_seqlens_k: Any,
    cu_seqlens_k_new: Any, seqused_q: Any, seqused_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, page_table: Any,
    kv_batch_idx: Any, leftpad_k: Any, rotary_cos: Any, rotary_sin: Any, seqlens_rotary: Any, q_descale: Any,
    k_descale: Any, v_descale: Any, softmax_scale: Any, causal: Any, window_size: Any = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Any = None,
    num_splits: int = 1, pack_gqa: Any = None, sm_margin: int = 0,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Of FlashAttention 3 (``hopper/flash_attn_interface.py``)."""
    assert k_new is v_new is qv is out is seqused_q is seqused_k is page_table is q_descale is None
    calls.append("flash_attention_3")
    _check(q, k, v)
    _lengths(cu_seqlens_q, cu_seqlens_k, q, k, max_seqlen_q, max_seqlen_k)
    options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
    return *_pair_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, **options), None, None


def _flash_attn_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, sequed_q: Any,
    sequed_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, dq: Any, dk: Any, dv: Any, softmax_scale: Any, causal: Any,
    window_size: Any = (-1, -1), softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Of FlashAttention 3: fills the gradients that it is given."""
    rule = (softmax_scale, causal, window_size, softcap, deterministic)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _fill(dout, q, k, v, out, softmax_lse, (dq, dk, dv), lengths, *rule)
    return dq, dk, dv, softmax_lse


def _no_dropout_under_a_softcap(softcap: float, dropout: float) -> None:
    if softcap and dropout:
        raise RuntimeError("Softcapping does not support dropout for now")


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
        repeats.append(deterministic)
        _check(q, k, v)
        _no_dropout_under_a_softcap(softcap, dropout_p)
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
    ) -> Any:
        """``[tokens, H, D]`` → ``[tokens, H, D]``."""
        calls.append("flash_attention_2")
        repeats.append(deterministic)
        _check(q, k, v)
        _no_dropout_under_a_softcap(softcap, dropout_p)
        options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if return_attn_probs:
            _lengths(cu_seqlens_q, cu_seqlens_k, q, k, max_seqlen_q, max_seqlen_k)
            return *_pair_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, **options), q.new_empty(0)
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
        repeats.append(deterministic)
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
    ) -> Any:
        """``[tokens, H, D]`` → ``[tokens, H, D]``."""
        options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        if q_descale is not None:
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            out, lse = fp8_forward(q, k, v, (q_descale, k_descale, v_descale), lengths, **options)
            return (out, lse) if return_attn_probs else out
        calls.append("flash_attention_3")
        repeats.append(deterministic)
        _check(q, k, v)
        return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    @staticmethod
    def flash_attn_with_kvcache(*_: Any, **__: Any) -> Any:
        """Paged inference: not used by any test."""
        raise NotImplementedError


class FlashAttention3Forward:
    """``fa3_fwd_interface`` (fa3-fwd 0.0.3): bf16 and fp8, forward only, built without windows and fp16."""

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
    ) -> Any:
        """``[tokens, H, D]`` → ``[tokens, H, D]``, or with the logsumexp ``[H, tokens]``."""
        if tuple(window_size) != (-1, -1):
            raise RuntimeError("This flash attention build does not support local attention.")
        scales, lengths = (q_descale, k_descale, v_descale), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        options = {"scale": softmax_scale, "causal": causal, "window": (-1, -1), "softcap": softcap}
        out, lse = fp8_forward(q, k, v, scales, lengths, **options)
        return (out, lse) if return_attn_probs else out


def fp8_forward(q: Any, k: Any, v: Any, scales: Any, lengths: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention 3 on e4m3: bf16 ``[tokens, H, D]`` and the logsumexp ``[H, tokens]``."""
    calls.append("fp8")
    if q.dtype != torch.float8_e4m3fn and not (_sharp and q.dtype == torch.float32):
        raise RuntimeError("descale is for fp8")
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query, key and value must have the same dtype")
    if q.shape[-1] % (8 if _sharp else 16) or q.shape[-1] > 256 or v.shape[-1] != q.shape[-1]:
        raise RuntimeError("head dims in fp8 are multiples of 16, at most 256")
    cu_q, cu_k, max_q, max_k = lengths
    _lengths(cu_q, cu_k, q, k, max_q, max_k)
    shape = (len(cu_k) - 1, k.shape[1])
    if any(scale is None or scale.shape != shape or scale.dtype != torch.float32 for scale in scales):
        raise RuntimeError(f"descale must be float32 of shape {shape}")
    rounds, group = q.dtype == torch.float8_e4m3fn, q.shape[1] // k.shape[1]
    parts = []
    for number in range(shape[0]):
        queries, keys = (slice(int(cu[number]), int(cu[number + 1])) for cu in (cu_q, cu_k))
        undo = [scale[number][:, None] for scale in scales]
        one = (q[queries].float() * undo[0].repeat_interleave(group, 0), k[keys].float() * undo[1])
        parts.append(_with_logsumexp(*one, v[keys].float() * undo[2], fp8=rounds, **options))
    out = torch.cat([part[0] for part in parts]).to(torch.bfloat16 if rounds else q.dtype)
    return out, torch.cat([part[1] for part in parts], 1)


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
        repeats.append(deterministic)
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
        repeats.append(deterministic)
        if not isinstance(max_seqlen_q, int) or not isinstance(max_seqlen_k, int):
            raise TypeError("max_seqlen must be an int")
        options = _options_4(q, k, v, softmax_scale, causal, window_size, learnable_sink, softcap)
        return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options), None


def _options_4(
    q: Any, k: Any, v: Any, scale: Any, causal: bool, window: tuple[int | None, int | None], sinks: Any, softcap: float
) -> dict[str, Any]:
    _check(q, k, v)
    if sinks is not None and sinks.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError("learnable_sink must be float16, bfloat16, or float32")
    sides = tuple(-1 if side is None else side for side in window)
    return {"scale": scale, "causal": causal, "window": sides, "softcap": softcap, "sinks": sinks}
