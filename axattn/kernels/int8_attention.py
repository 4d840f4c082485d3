"""INT8 attention over packed documents: Q.K^T in INT8, P.V in 16 bit, softmax and logsumexp in fp32.

The method is SageAttention's (arXiv:2410.02367, arXiv:2411.10958): K loses its mean, which does not change softmax, and
Q and K are rounded to 8 bit with scales. Beyond the papers:

- The mean is taken per document, so no document changes another.
- Scales are per token, for Q and K, and both are rotated by a Hadamard matrix before rounding: q.k is unchanged (the
  matrix is orthogonal), and an outlier channel is spread over 64.
- Packed documents, causal masks (aligned bottom-right), windows, softcap, grouped heads; tails are masked exactly.
- The logsumexp of the smoothed problem is returned in fp32 for the backward
  (`axattn.backends.varlen_engine.flash_backward`; SageBwd, arXiv:2603.02170: smoothing K is essential and dP stays in
  16 bit, as in flash attention's backward).

With a softcap K keeps its mean, because ``tanh`` is not shift-invariant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from axattn.hf.transfers import on_device
from axattn.kernels.hadamard import hadamard

LOG2E = 1.4426950408889634


@triton.jit
def _quantise_kernel(
    X,
    MEAN,
    DOCUMENT,
    HADAMARD,
    ROUNDED,
    SCALE,
    SMOOTH,
    tokens,
    heads,
    size,
    stride_t,
    stride_h,
    factor,
    HAS_MEAN: tl.constexpr,
    ROTATE: tl.constexpr,
    TURN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of tokens of one head: smooth, rotate, round. ``X [tokens, heads, size]`` → ``[tokens, heads, SIZE]``.

    `size` and the strides are in units of 8 values (`require_aligned_to_8`).
    """
    size = size * 8
    stride_t = stride_t * 8
    stride_h = stride_h * 8
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1)
    d = tl.arange(0, SIZE)
    inside = (t < tokens)[:, None] & (d < size)[None, :]
    wide = t.to(tl.int64)
    x = tl.load(X + wide[:, None] * stride_t + h * stride_h + d[None, :], mask=inside, other=0.0)
    if HAS_MEAN:
        document = tl.load(DOCUMENT + t, mask=t < tokens, other=0).to(tl.int64)
        mean = tl.load(MEAN + (document * heads + h)[:, None] * size + d[None, :], mask=inside, other=0.0)
        x = (x.to(tl.float32) - mean).to(X.dtype.element_ty)
        tl.store(SMOOTH + (wide * heads + h)[:, None] * size + d[None, :], x, mask=inside)
    if ROTATE:
        e = tl.arange(0, TURN)
        matrix = tl.load(HADAMARD + e[:, None] * TURN + e[None, :])
        parts = tl.reshape(x, (BLOCK * SIZE // TURN, TURN))
        turned = tl.reshape(tl.dot(parts, matrix, input_precision="ieee"), (BLOCK, SIZE))
    else:
        turned = x.to(tl.float32)
    peak = tl.max(tl.abs(turned), 1)
    # a maximum ignores NaN; adding 0 * turned keeps NaN from being rounded to a number
    scale = tl.where(peak > 1e-30, peak / 127.0, 1.0) + tl.sum(turned * 0.0, 1)
    rounded = tl.floor(turned / scale[:, None] + 0.5)
    tl.store(ROUNDED + (wide * heads + h)[:, None] * SIZE + d[None, :], rounded.to(tl.int8), mask=(t < tokens)[:, None])
    tl.store(SCALE + h.to(tl.int64) * tokens + wide, scale * factor, mask=t < tokens)


@triton.jit
def _attend(
    acc,
    total,
    peak,
    q,
    q_scale,
    rows,
    K,
    K_SCALE,
    V,
    k_length,
    stride_kt,
    stride_vt,
    size,
    low,
    high,
    window,
    softcap,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Blocks of keys ``[low, high)`` for one block of queries; `rows` are the queries' positions in the keys."""
    d = tl.arange(0, SIZE)
    for start in tl.range(low, high, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        wide = n.to(tl.int64)
        if MASKED:
            k = tl.load(K + wide[:, None] * stride_kt + d[None, :], mask=(n < k_length)[:, None], other=0)
            k_scale = tl.load(K_SCALE + n, mask=n < k_length, other=0.0)
        else:
            k = tl.load(K + wide[:, None] * stride_kt + d[None, :])
            k_scale = tl.load(K_SCALE + n)
        s = tl.dot(q, tl.trans(k)).to(tl.float32) * q_scale[:, None] * k_scale[None, :]
        if SOFTCAP:
            # softcap * tanh(s / softcap), in base 2
            grown = tl.exp2(s * (2.8853900817779268 / softcap))
            s = (softcap * 1.4426950408889634) * (1.0 - 2.0 / (grown + 1.0))
        if MASKED:
            seen = (n < k_length)[None, :]
            if CAUSAL:
                seen = seen & (n[None, :] <= rows[:, None])
                if WINDOW:
                    seen = seen & (n[None, :] > rows[:, None] - window)
            elif WINDOW:
                seen = seen & (tl.abs(n[None, :] - rows[:, None]) < window)
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if MASKED:
            inside = (n < k_length)[:, None] & (d < size)[None, :]
            v = tl.load(V + wide[:, None] * stride_vt + d[None, :], mask=inside, other=0.0)
        elif PADDED:
            v = tl.load(V + wide[:, None] * stride_vt + d[None, :], mask=(d < size)[None, :], other=0.0)
        else:
            v = tl.load(V + wide[:, None] * stride_vt + d[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        peak = higher
    return acc, total, peak


@triton.jit
def _forward_kernel(
    Q,
    K,
    V,
    Q_SCALE,
    K_SCALE,
    OUT,
    LSE,
    BLOCKS,
    CU_Q,
    CU_K,
    q_tokens,
    k_tokens,
    heads,
    kv_heads,
    size,
    stride_vt,
    stride_vh,
    logit_scale,
    window,
    softcap,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head. ``BLOCKS``: int32 ``[blocks, 2]``, the document and its first query.

    `size` and the strides are in units of 8 values (`require_aligned_to_8`).
    """
    size = size * 8
    stride_vt = stride_vt * 8
    stride_vh = stride_vh * 8
    document = tl.load(BLOCKS + 2 * tl.program_id(0))
    first = tl.load(BLOCKS + 2 * tl.program_id(0) + 1)
    h = tl.program_id(1)
    kv = h // (heads // kv_heads)
    q_start = tl.load(CU_Q + document)
    k_start = tl.load(CU_K + document)
    q_length = tl.load(CU_Q + document + 1) - q_start
    k_length = tl.load(CU_K + document + 1) - k_start
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, SIZE)
    offset = k_length - q_length
    rows = m + offset  # bottom-right: the last query sits at the last key
    token = (q_start + m).to(tl.int64)
    real = m < q_length
    q = tl.load(Q + (token * heads + h)[:, None] * SIZE + d[None, :], mask=real[:, None], other=0)
    q_scale = tl.load(Q_SCALE + h.to(tl.int64) * q_tokens + token, mask=real, other=0.0) * logit_scale

    keys = k_start.to(tl.int64)
    K += (keys * kv_heads + kv) * SIZE
    K_SCALE += kv.to(tl.int64) * k_tokens + keys
    V += keys * stride_vt + kv * stride_vh
    last = tl.minimum(first + BLOCK_M, q_length) - 1 + offset  # key position of the last query
    # keys visible to some query of the block: [low, high); to every query: [whole_low, whole_high)
    low = 0
    whole_low = 0
    high = k_length
    whole_high = k_length
    if CAUSAL:
        high = tl.minimum(last + 1, k_length)
        whole_high = tl.minimum(first + offset + 1, k_length)
    elif WINDOW:
        high = tl.minimum(last + window, k_length)
        whole_high = tl.minimum(first + offset + window, k_length)
    if WINDOW:
        low = tl.maximum(first + offset - window + 1, 0)
        whole_low = tl.maximum(last - window + 1, 0)
    low = low // BLOCK_N * BLOCK_N
    whole_low = tl.minimum((whole_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N, tl.maximum(high, 0))
    whole_high = tl.maximum(tl.maximum(whole_high, 0) // BLOCK_N * BLOCK_N, whole_low)

    acc = tl.zeros((BLOCK_M, SIZE), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    stride_kt = kv_heads * SIZE
    if WINDOW:
        acc, total, peak = _attend(
            acc, total, peak, q, q_scale, rows, K, K_SCALE, V, k_length, stride_kt, stride_vt, size,
            low, whole_low, window, softcap, True, CAUSAL, WINDOW, SOFTCAP, PADDED, SIZE, BLOCK_N,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, q_scale, rows, K, K_SCALE, V, k_length, stride_kt, stride_vt, size,
        whole_low, whole_high, window, softcap, False, CAUSAL, WINDOW, SOFTCAP, PADDED, SIZE, BLOCK_N,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, q_scale, rows, K, K_SCALE, V, k_length, stride_kt, stride_vt, size,
        whole_high, high, window, softcap, True, CAUSAL, WINDOW, SOFTCAP, PADDED, SIZE, BLOCK_N,
    )  # fmt: skip
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("inf"))
    where = (token * heads + h)[:, None] * size + d[None, :]
    tl.store(OUT + where, out.to(OUT.dtype.element_ty), mask=real[:, None] & (d < size)[None, :])
    tl.store(LSE + h.to(tl.int64) * q_tokens + token, lse, mask=real)


class Tuning(NamedTuple):
    """Block sizes and launch parameters of the forward kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def tuning(size: int, sm: int | None) -> Tuning:
    """The `Tuning` for a padded head dim and an architecture (None: the interpreter).

    It fits the shared memory of a block (`shared_memory`) and spills no registers: tests/real/int8_kernels.py compiles
    it for every chip.
    """
    if sm is None:
        return Tuning(64, 64, 4, 1)
    if shared_memory(sm) >= 227:
        return Tuning(128, 128, 8, 3) if size <= 128 else Tuning(128, 64, 8, 2)
    if size <= 64:
        return Tuning(128, 64, 8, 3)
    return Tuning(128, 64, 8, 2) if size <= 128 else Tuning(64, 64, 8, 2)


def shared_memory(sm: int) -> int:
    """KiB of shared memory per block (CUDA programming guide, "Compute Capabilities")."""
    if sm < 80:
        return 64
    if sm in (80, 87):
        return 163
    return 227 if 90 <= sm < 120 else 99


def padded_size(head_dim: int) -> int:
    """The next power of two that INT8 tensor cores support: at least 32."""
    return max(32, 1 << (head_dim - 1).bit_length())


def aligned_to_8(x: torch.Tensor) -> torch.Tensor:
    """``[tokens, H, D]`` as the kernels read it, eight values at a time: copied if its strides don't allow that."""
    return x.contiguous() if x.stride(-1) != 1 or _unaligned_strides(x) else x


def require_aligned_to_8(x: torch.Tensor) -> None:
    """Raise unless the kernels can read `x` eight values at a time.

    Head dims and strides are passed in units of 8, which lets the compiler load 8 adjacent values at once. Otherwise it
    loads single values, and the pointers of a head dim that is not a multiple of 16 spill registers.

    Raises:
        ValueError: a size or stride is not a multiple of 8, or the last dimension is not contiguous.
    """
    if x.shape[-1] % 8 or x.stride(-1) != 1 or _unaligned_strides(x):
        raise ValueError(f"INT8 kernels read eight values at a time: shape {list(x.shape)}, strides {x.stride()}")


def _unaligned_strides(x: torch.Tensor) -> bool:
    return any(x.stride(dim) % 8 for dim in (0, 1) if x.shape[dim] > 1)


class Rounded(NamedTuple):
    """A tensor in INT8.

    Attributes:
        values: int8 ``[tokens, H, padded size]``.
        scales: float32 ``[H, tokens]``.
        smooth: the values before rotation and rounding, ``[tokens, H, D]``.
    """

    values: torch.Tensor
    scales: torch.Tensor
    smooth: torch.Tensor


def quantise(x: torch.Tensor, mean: torch.Tensor | None = None, document: torch.Tensor | None = None) -> Rounded:
    """Round ``[tokens, H, D]`` to INT8 per token and head.

    Args:
        x: from `aligned_to_8`.
        mean: float32 ``[documents, H, D]`` to subtract, or None.
        document: int32 ``[tokens]``, the document of each token (with `mean`).
    """
    require_aligned_to_8(x)
    tokens, heads, head_dim = x.shape
    size = padded_size(head_dim)
    turn = min(64, head_dim & -head_dim)  # the largest power of two that divides the head dim, at most 64
    values = torch.empty(tokens, heads, size, dtype=torch.int8, device=x.device)
    scales = torch.empty(heads, tokens, dtype=torch.float32, device=x.device)
    smooth = x if mean is None else torch.empty(tokens, heads, head_dim, dtype=x.dtype, device=x.device)
    block = max(16, 4096 // size)  # more would spill registers
    _quantise_kernel[(triton.cdiv(tokens, block), heads)](
        x,
        x if mean is None else mean,
        x if document is None else document,
        hadamard(turn, x.dtype, x.device) if turn >= 16 else x,
        values,
        scales,
        smooth,
        tokens,
        heads,
        head_dim // 8,
        x.stride(0) // 8,
        x.stride(1) // 8,
        turn**-0.5 if turn >= 16 else 1.0,
        HAS_MEAN=mean is not None,
        ROTATE=turn >= 16,
        TURN=max(turn, 16),
        SIZE=size,
        BLOCK=block,
        num_warps=4,
    )
    return Rounded(values, scales, smooth)


def query_blocks(lengths: tuple[int, ...], block: int, device: torch.device) -> torch.Tensor:
    """int32 ``[blocks, 2]``: document and first query of each block, sorted from most to fewest preceding keys."""
    found = [(document, first) for document, length in enumerate(lengths) for first in range(0, length, block)]
    found.sort(key=lambda entry: -entry[1])
    return on_device(torch.tensor(found, dtype=torch.int32).reshape(-1, 2), device)


def forward(
    q: Rounded,
    k: Rounded,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    blocks: torch.Tensor,
    *,
    cut: Tuning,
    causal: bool,
    window: int | None,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 attention of packed documents.

    Args:
        q: queries ``[tokens, H, D]``, rounded.
        k: keys ``[tokens, Hkv, D]``, rounded.
        value: ``[tokens, Hkv, D]``, from `aligned_to_8`.
        cu_q: cu_seqlens of the queries, int32 ``[documents + 1]``.
        cu_k: cu_seqlens of the keys, int32 ``[documents + 1]``.
        blocks: from `query_blocks`.
        cut: from `tuning`; its ``block_m`` must be that of `blocks`.
        causal: aligned bottom-right.
        window: visible keys to the left, the query's own included (and to the right if not causal); None for all.
        softcap: 0 for none.
        scale: factor on the logits.

    Returns:
        Output ``[tokens, H, D]`` in the dtype of `value`, and the logsumexp, float32 ``[H, tokens]``.
    """
    require_aligned_to_8(value)
    q_tokens, heads, size = q.values.shape
    k_tokens, kv_heads, head_dim = value.shape
    out = torch.empty(q_tokens, heads, head_dim, dtype=value.dtype, device=value.device)
    lse = torch.empty(heads, q_tokens, dtype=torch.float32, device=value.device)
    _forward_kernel[(blocks.shape[0], heads)](
        q.values,
        k.values,
        value,
        q.scales,
        k.scales,
        out,
        lse,
        blocks,
        cu_q,
        cu_k,
        q_tokens,
        k_tokens,
        heads,
        kv_heads,
        head_dim // 8,
        value.stride(0) // 8,
        value.stride(1) // 8,
        scale if softcap else scale * LOG2E,
        window or 0,
        softcap,
        CAUSAL=causal,
        WINDOW=window is not None,
        SOFTCAP=softcap > 0,
        PADDED=size != head_dim,
        SIZE=size,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return out, lse
