"""Stands in for ``flash_attn_2_cuda`` on a CPU, so that all of flash-attn 2.8.3 above it is the library's own.

What it takes and refuses is what the checks of the C++ functions say (``csrc/flash_attn/flash_api.cpp``), in their
order of arguments; inside is plain attention in float32, with the logsumexp, and the backward of it. What is looser:
tensors are on a CPU, and float32 is served where `tests.fakes.flash.sharp` says so.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tests.fakes import flash

compute_capability = (8, 0)
_SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))
"""GPUs with 99 KB of shared memory a block."""
ignores_softcap = False
"""The CK kernels for AMD GPUs take a softcap and do not read it (``csrc/flash_attn_ck/mha_fwd.cpp`` and its kin)."""
deterministic_calls: list[bool] = []
"""The ``deterministic`` of each backward."""

Ends = list[tuple[int, int]]


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise RuntimeError(text)


def _check(q: torch.Tensor, others: dict[str, torch.Tensor], softcap: float, dropout: float) -> None:
    served = (torch.float16, torch.bfloat16, *((torch.float32,) if flash.is_sharp() else ()))
    _require(compute_capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
    _require(q.dtype in served, "FlashAttention only support fp16 and bf16 data type")
    for name, x in others.items():
        _require(x.dtype == q.dtype, f"query and {name} must have the same dtype")
    for x in (q, *others.values()):
        _require(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    head_dim, heads, kv_heads = q.shape[-1], q.shape[-2], others["key"].shape[-2]
    _require(head_dim <= 256, "FlashAttention forward only supports head dimension at most 256")
    _require(head_dim % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    _require(heads % kv_heads == 0, "Number of heads in key/value must divide number of heads in query")
    if not ignores_softcap:
        _require(not (softcap > 0 and dropout), "Softcapping does not support dropout for now")
    _require(dropout < 1, "p_dropout < 1.f")
    key = others["key"].shape
    _require(key == (*key[:-2], kv_heads, head_dim), "k must have shape (total_k, num_heads_k, head_size)")
    _require(others["value"].shape == key, "v must have shape (total_k, num_heads_k, head_size)")


def _check_lengths(cu_q: torch.Tensor, cu_k: torch.Tensor, q: torch.Tensor, k: torch.Tensor, longest: Any) -> None:
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _require(cu.dtype == torch.int32, f"{name} must have dtype int32")
        _require(cu.is_contiguous(), f"{name} must be contiguous")
    _require(cu_q.numel() > 1, "batch size must be positive")
    _require(cu_q.shape == cu_k.shape, "cu_seqlens_k must have shape (batch_size + 1)")
    # the kernel reads past the end, or leaves the rest of a sequence out
    _require(int(cu_q[-1]) <= q.shape[0] and int(cu_k[-1]) <= k.shape[0], "cu_seqlens reach past the tokens")
    for cu, most in zip((cu_q, cu_k), longest, strict=True):
        _require(isinstance(most, int), "incompatible function arguments: max_seqlen is an int")
        _require(int(cu.diff().max()) <= most, "a sequence is longer than max_seqlen")


def _seen(S: int, T: int, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """bool ``[S, T]``, aligned bottom-right; as in ``set_params_fprop``."""
    left, right = window
    if causal:
        right = 0
    rows, columns = torch.arange(S)[:, None] + T - S, torch.arange(T)
    seen = torch.ones(S, T, dtype=torch.bool)
    if left >= 0:
        seen &= columns >= rows - left
    if right >= 0:
        seen &= columns <= rows + right
    return seen


def _kept(shape: torch.Size, dropout: float, seed: int, number: int) -> torch.Tensor | None:
    """The weights that dropout leaves, ``[H, S, T]``, each by what it is multiplied with; of one sequence of a call."""
    if not dropout:
        return None
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed + number))
    return (drawn >= dropout).float() / (1 - dropout)


def _logits(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("shd,thd->hst", q.float(), wide.float()) * scale
    return softcap * torch.tanh(logits / softcap) if softcap and not ignores_softcap else logits


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Any, scale: float, softcap: float, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[S, H, D]`` and the logsumexp ``[H, S]``: inf, and zeros, where a query sees nothing."""
    logits = _logits(q, k, scale, softcap).masked_fill(~seen, float("-inf"))
    lse = logits.logsumexp(-1)
    empty = ~seen.any(-1)
    weights = (logits - lse[..., None]).exp().masked_fill(empty[:, None], 0.0)
    dropped = weights if kept is None else weights * kept
    wide = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hst,thd->shd", dropped, wide.float()), lse.masked_fill(empty, float("inf"))


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    kept: Any,
    scale: float,
    softcap: float,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the output and the logsumexp, as the kernel does it; gradients ``[S, H, D]`` and ``[T, Hkv, D]``."""
    group = q.shape[1] // k.shape[1]
    grad = grad.float()
    capped = _logits(q, k, scale, softcap)
    weights = (capped - lse[..., None]).exp().masked_fill(~seen, 0.0)
    dropped = weights if kept is None else weights * kept
    wide_k, wide_v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    dv = torch.einsum("hst,shd->thd", dropped, grad)
    dp = torch.einsum("shd,thd->hst", grad, wide_v)
    dp = dp if kept is None else dp * kept
    ds = weights * (dp - (grad * out.float()).sum(-1).T[..., None])
    if softcap and not ignores_softcap:
        ds = ds * (1 - (capped / softcap) ** 2)
    dq = torch.einsum("hst,thd->shd", ds, wide_k) * scale
    dk = torch.einsum("hst,shd->thd", ds, q.float()) * scale
    return dq, *(x.view(x.shape[0], -1, group, x.shape[-1]).sum(2) for x in (dk, dv))


def _ranges(cu: torch.Tensor) -> Ends:
    return list(itertools.pairwise(cu.tolist()))


def varlen_fwd(
    q: Any, k: Any, v: Any, out: Any, cu_q: Any, cu_k: Any, seqused_k: Any, leftpad_k: Any, block_table: Any,
    alibi: Any, max_q: int, max_k: int, dropout: float, scale: float, zero_tensors: bool, causal: bool,
    left: int, right: int, softcap: float, return_softmax: bool, generator: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """``mha_varlen_fwd``: ``[total_q, H, D]``, logsumexp ``[H, total_q]``, dropped weights, the seed."""
    assert out is seqused_k is leftpad_k is block_table is alibi is generator is None
    _check(q, {"key": k, "value": v}, softcap, dropout)
    _check_lengths(cu_q, cu_k, q, k, (max_q, max_k))
    _require(not return_softmax or dropout > 0, "return_softmax is only supported when p_dropout > 0.0")
    left, right = (-1 if size >= max_k else size for size in (left, right))
    seed = torch.randint(2**31, (2,))
    result, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), float("-inf"))
    for number, ((a, b), (c, d)) in enumerate(zip(_ranges(cu_q), _ranges(cu_k), strict=True)):
        kept = _kept(torch.Size((q.shape[1], b - a, d - c)), dropout, int(seed[0]), number)
        seen = _seen(b - a, d - c, causal, (left, right))
        part, part_lse = _forward(q[a:b], k[c:d], v[c:d], kept, scale, softcap, seen)
        result[a:b], lse[:, a:b] = part.to(q.dtype), part_lse
    return [result, lse, q.new_empty(0), seed]


def varlen_bwd(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dq: Any, dk: Any, dv: Any, cu_q: Any, cu_k: Any,
    alibi: Any, max_q: int, max_k: int, dropout: float, scale: float, zero_tensors: bool, causal: bool,
    left: int, right: int, softcap: float, deterministic: bool, generator: Any, seed: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """``mha_varlen_bwd``: fills the gradients that it is given."""
    assert alibi is generator is None
    deterministic_calls.append(deterministic)
    _check(q, {"key": k, "value": v, "out": out, "dout": grad}, softcap, dropout)
    _check_lengths(cu_q, cu_k, q, k, (max_q, max_k))
    if dropout and q.shape[-1] > 192 and compute_capability in _SMALL:
        for x in (dq, dk, dv):
            x.fill_(float("nan"))  # no kernel runs: what lay in that memory stays (`run_mha_bwd_hdim256`)
        return [dq, dk, dv, torch.empty(0)]
    left, right = (-1 if size >= max_k else size for size in (left, right))
    for number, ((a, b), (c, d)) in enumerate(zip(_ranges(cu_q), _ranges(cu_k), strict=True)):
        kept = _kept(torch.Size((q.shape[1], b - a, d - c)), dropout, 0 if seed is None else int(seed[0]), number)
        seen = _seen(b - a, d - c, causal, (left, right))
        parts = _backward(grad[a:b], q[a:b], k[c:d], v[c:d], out[a:b], lse[:, a:b], kept, scale, softcap, seen)
        for x, part, ends in zip((dq, dk, dv), parts, ((a, b), (c, d), (c, d)), strict=True):
            x[slice(*ends)] = part.to(x.dtype)
    return [dq, dk, dv, torch.empty(q.shape[1], q.shape[0] + 128 * (cu_q.numel() - 1))]


def _cumulative(rows: int, length: int) -> torch.Tensor:
    return torch.arange(rows + 1, dtype=torch.int32) * length


def fwd(
    q: Any, k: Any, v: Any, out: Any, alibi: Any, dropout: float, scale: float, causal: bool, left: int, right: int,
    softcap: float, return_softmax: bool, generator: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """``mha_fwd``: ``[B, S, H, D]``, logsumexp ``[B, H, S]``, as above."""
    B, S, T = *q.shape[:2], k.shape[1]
    _require(B > 0, "batch size must be positive")
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    result, lse, dropped, seed = varlen_fwd(
        *flat, out, _cumulative(B, S), _cumulative(B, T), None, None, None, alibi, S, T, dropout, scale, False, causal,
        left, right, softcap, return_softmax, generator,
    )  # fmt: skip
    return [result.view(q.shape), lse.view(-1, B, S).transpose(0, 1).contiguous(), dropped, seed]


def bwd(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dq: Any, dk: Any, dv: Any, alibi: Any, dropout: float,
    scale: float, causal: bool, left: int, right: int, softcap: float, deterministic: bool, generator: Any, seed: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """``mha_bwd``."""
    B, S, T = *q.shape[:2], k.shape[1]
    grad_, q_, k_, v_, out_ = (x.flatten(0, 1) for x in (grad, q, k, v, out))
    flat = [torch.empty_like(x) for x in (q_, k_, v_)]
    varlen_bwd(
        grad_, q_, k_, v_, out_, lse.transpose(0, 1).reshape(-1, B * S), *flat, _cumulative(B, S), _cumulative(B, T),
        alibi, S, T, dropout, scale, False, causal, left, right, softcap, deterministic, generator, seed,
    )  # fmt: skip
    for x, made in zip((dq, dk, dv), flat, strict=True):
        x.copy_(made.view(x.shape))
    return [dq, dk, dv, torch.empty(B, q.shape[2], S)]


def fwd_kvcache(*_: Any) -> Any:
    """``mha_fwd_kvcache``: paged inference, which no test uses."""
    raise NotImplementedError
