"""Quantises packed documents to FP8 (e4m3), with a scale per document and KV head; keys lose their document's mean.

Two launches per tensor read it once each, and the result is written once. The first computes statistics per chunk of a
document: the largest absolute value, or, for keys, sum, minimum and maximum of each channel. These give the largest
absolute value after the mean is subtracted (rounding keeps order, so it is exact). The second launch joins the
statistics of a document's chunks in a fixed order, scales and rounds.

The e4m3 bits are computed in integer arithmetic, to nearest, ties to even, because the interpreter's casts truncate;
torch's cast gives the same bits (tests/kernels/test_fp8_quantiser.py). That takes 14 instructions per element instead
of 4 (sm90), and the second launch is still memory-bound. Launches are on the current GPU
(`axattn.backends.base.on_gpu_of`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from axattn.kernels.document_statistics import Documents

WARPS = 4


@triton.jit
def _e4m3(x):
    """Float32 to the bits of e4m3fn, uint8: to nearest, ties to even; saturates at 448, keeps NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    power = tl.maximum(size & 0x7F800000, 0x3C800000)  # the power of two below, at least 2**-6: lower are subnormal
    shifter = power + (20 << 23)  # adding power * 2**20 rounds to three bits after the leading one
    rounded = size.to(tl.float32, bitcast=True) + shifter.to(tl.float32, bitcast=True)
    code = rounded.to(tl.int32, bitcast=True) - shifter + (power >> 20) - ((127 - 7 + 1) << 3)
    return (tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)  # noqa: PLR0124  # False for NaN


@triton.jit
def _statistics_kernel(
    X,
    CHUNKS,
    PEAK,
    SUM,
    LOW,
    HIGH,
    heads,
    size,
    stride_t,
    stride_h,
    MEAN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one head: writes ``PEAK [chunks, heads]`` or ``SUM``, ``LOW``, ``HIGH [chunks, heads, size]``."""
    at = tl.program_id(0).to(tl.int64)  # chunk and head
    h = at % heads
    start = tl.load(CHUNKS + 5 * (at // heads) + 1)
    stop = tl.load(CHUNKS + 5 * (at // heads) + 2)
    d = tl.arange(0, SIZE)
    largest = tl.zeros((BLOCK, SIZE), tl.float32)
    if MEAN:
        largest = tl.full((BLOCK, SIZE), float("-inf"), tl.float32)
        least = tl.full((BLOCK, SIZE), float("inf"), tl.float32)
        total = tl.zeros((BLOCK, SIZE), tl.float32)
    for first in tl.range(start, stop, BLOCK):
        t = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (t < stop)[:, None] & (d < size)[None, :]
        x = tl.load(X + t[:, None] * stride_t + h * stride_h + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            total += x
            least = tl.minimum(least, tl.where(inside, x, float("inf")))
            largest = tl.maximum(largest, tl.where(inside, x, float("-inf")))
        else:
            largest = tl.maximum(largest, tl.abs(x))
    if MEAN:
        tl.store(SUM + at * size + d, tl.sum(total, 0), mask=d < size)
        tl.store(LOW + at * size + d, tl.min(least, 0), mask=d < size)
        tl.store(HIGH + at * size + d, tl.max(largest, 0), mask=d < size)
    else:
        tl.store(PEAK + at, tl.max(tl.max(largest, 1), 0))


@triton.jit
def _round_kernel(
    X,
    CHUNKS,
    PEAK,
    SUM,
    LOW,
    HIGH,
    ROUNDED,
    UNDO,
    SMOOTH,
    heads,
    group,
    size,
    stride_t,
    stride_h,
    smallest,
    MEAN: tl.constexpr,
    ROUND: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one head: writes ``ROUNDED [tokens, heads, size]`` (if ROUND) and ``SMOOTH``, alike (if MEAN). The
    first chunk of a document and first head of a group write ``UNDO [documents, heads / group]``."""
    at = tl.program_id(0).to(tl.int64)
    chunk = at // heads
    h = at % heads
    kv = h // group
    document = tl.load(CHUNKS + 5 * chunk)
    start = tl.load(CHUNKS + 5 * chunk + 1)
    stop = tl.load(CHUNKS + 5 * chunk + 2)
    first_chunk = tl.load(CHUNKS + 5 * chunk + 3)
    end_chunk = tl.load(CHUNKS + 5 * chunk + 4)
    d = tl.arange(0, SIZE)
    STEP: tl.constexpr = 16  # chunks whose statistics are read at a time
    c = tl.arange(0, STEP)
    if MEAN:
        total = tl.zeros((SIZE,), tl.float32)
        least = tl.full((SIZE,), float("inf"), tl.float32)
        largest = tl.full((SIZE,), float("-inf"), tl.float32)
        for n in tl.range(first_chunk, end_chunk, STEP):
            there = (n + c < end_chunk)[:, None] & (d < size)[None, :]
            where = ((n + c).to(tl.int64) * heads + h)[:, None] * size + d[None, :]
            total += tl.sum(tl.load(SUM + where, mask=there, other=0.0), 0)
            if ROUND:
                least = tl.minimum(least, tl.min(tl.load(LOW + where, mask=there, other=float("inf")), 0))
                largest = tl.maximum(largest, tl.max(tl.load(HIGH + where, mask=there, other=float("-inf")), 0))
        tokens = tl.load(CHUNKS + 5 * end_chunk - 3) - tl.load(CHUNKS + 5 * first_chunk + 1)
        mean = tl.div_rn(total, tl.zeros((SIZE,), tl.float32) + tokens)
        least = tl.abs((least - mean).to(X.dtype.element_ty).to(tl.float32))
        largest = tl.abs((largest - mean).to(X.dtype.element_ty).to(tl.float32))
        peak = tl.max(tl.where(d < size, tl.maximum(least, largest), 0.0), 0)
    else:
        g = tl.arange(0, GROUP)
        peaks = tl.zeros((STEP, GROUP), tl.float32)
        for n in tl.range(first_chunk, end_chunk, STEP):
            there = (n + c < end_chunk)[:, None] & (g < group)[None, :]
            where = ((n + c).to(tl.int64) * heads + kv * group)[:, None] + g[None, :]
            peaks = tl.maximum(peaks, tl.load(PEAK + where, mask=there, other=0.0))
        peak = tl.max(tl.max(peaks, 1), 0)
    if ROUND:
        scale = tl.where(peak > smallest, tl.div_rn(448.0, tl.maximum(peak, smallest)), 1.0)
        if (chunk == first_chunk) & (h % group == 0):
            tl.store(
                UNDO + document.to(tl.int64) * (heads // group) + kv,
                tl.where(peak > smallest, tl.div_rn(peak, 448.0), 1.0),
            )
    for first in tl.range(start, stop, BLOCK):
        t = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (t < stop)[:, None] & (d < size)[None, :]
        x = tl.load(X + t[:, None] * stride_t + h * stride_h + d[None, :], mask=inside, other=0.0)
        to = (t * heads + h)[:, None] * size + d[None, :]
        if MEAN:
            x = (x.to(tl.float32) - mean[None, :]).to(X.dtype.element_ty)
            tl.store(SMOOTH + to, x, mask=inside)
        if ROUND:
            tl.store(ROUNDED + to, _e4m3(x.to(tl.float32) * scale), mask=inside)


def cut(head_dim: int) -> dict[str, int]:
    """The block sizes that the kernels are compiled for."""
    size = triton.next_power_of_2(head_dim)
    return {"SIZE": size, "BLOCK": max(1, 32 * 32 * WARPS // size)}  # 3 x 32 elements per thread fit into registers


SMALLEST = 1e-12
"""A smaller peak counts as zero, as in torchao: its scale would not be finite."""


class Fp8(NamedTuple):
    """A tensor in fp8.

    Attributes:
        values: float8_e4m3fn ``[tokens, H, D]``.
        undo: float32 ``[documents, Hkv]``, the dequantisation scale.
    """

    values: torch.Tensor
    undo: torch.Tensor


def quantise(x: torch.Tensor, documents: Documents, kv_heads: int) -> Fp8:
    """Quantise per document and KV head: the largest absolute value becomes the largest of fp8.

    Args:
        x: ``[tokens, H, D]``, the heads of a group adjacent.
        documents: its documents.
        kv_heads: divides H.
    """
    values, undo, _ = _run(x, documents, kv_heads, mean=False, round=True)
    return Fp8(values, undo)


def quantise_smoothed(key: torch.Tensor, keys: Documents) -> tuple[Fp8, torch.Tensor]:
    """`smoothed` keys ``[tokens, Hkv, D]``, in fp8 and before rounding."""
    values, undo, smooth = _run(key, keys, key.shape[1], mean=True, round=True)
    return Fp8(values, undo), smooth


def smoothed(key: torch.Tensor, keys: Documents) -> torch.Tensor:
    """``[tokens, Hkv, D]`` minus its mean per document, in its dtype."""
    return _run(key, keys, key.shape[1], mean=True, round=False)[2]


def _run(
    x: torch.Tensor, documents: Documents, kv_heads: int, *, mean: bool, round: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, undo, smooth; empty if not requested."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, heads, size = x.shape
    table = documents.chunks
    programs = table.shape[0] * heads
    sizes = cut(size)

    def empty(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=x.device)

    peak = empty(not mean, programs)
    total, low, high = (empty(mean, programs, size) for _ in range(3))
    values = empty(round, tokens, heads, size, dtype=torch.uint8)
    undo = empty(round, len(documents.lengths), kv_heads)
    smooth = empty(mean, tokens, heads, size, dtype=x.dtype)
    strides = (x.stride(0), x.stride(1))
    _statistics_kernel[(programs,)](
        x, table, peak, total, low, high, heads, size, *strides, MEAN=mean, **sizes, num_warps=WARPS
    )
    _round_kernel[(programs,)](
        x,
        table,
        peak,
        total,
        low,
        high,
        values,
        undo,
        smooth,
        heads,
        heads // kv_heads,
        size,
        *strides,
        SMALLEST,
        MEAN=mean,
        ROUND=round,
        GROUP=triton.next_power_of_2(heads // kv_heads),
        **sizes,
        num_warps=WARPS,
    )
    return values.view(torch.float8_e4m3fn), undo, smooth
