"""`bench`: times kernels on one attention shape, or on the shapes of a model's layers."""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from axattn import __version__, backends
from axattn.attention.interface import attend
from axattn.documents.boundaries import Segments
from axattn.errors import InvalidInputError, UnknownAttentionError
from axattn.machine.environment import Environment
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import lazy_mask
from axattn.planning.routes import ATTRIBUTE, Route
from axattn.tools.bench.shapes import Shape
from axattn.tools.bench.timing import Run, matmul_tflops, peak_bytes, ratio_of, timed, working

KERNELS = (
    "sdpa",
    "varlen",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "xformers",
    "sage",
    "sage:library",
    "fp8",
)
"""Kernels that axattn calls itself; native names are timed with a whole model (`bench_step`)."""
BASE = "sdpa"


@dataclass(frozen=True, slots=True)
class Timing:
    """One kernel on one shape.

    Attributes:
        kernel: its name.
        ms: median.
        spread: (largest - smallest) / median.
        ratio: time divided by that of ``sdpa`` in the same round, median; below 1 is faster.
        ratio_low: the lower quartile of these ratios.
        ratio_high: the upper quartile.
        tflops: useful TFLOP/s (causal pairs only).
        share: fraction of the measured matrix-product speed.
        peak_bytes: peak allocation, None on a CPU.
        error: relative error of the output against fp32; None if not measured.
        failed: why it did not run, ``""`` if it did.
    """

    kernel: str
    ms: float = math.nan
    spread: float = math.nan
    ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    tflops: float = math.nan
    share: float = math.nan
    peak_bytes: int | None = None
    error: float | None = None
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Bench:
    """The results of one benchmark run.

    Attributes:
        machine: the machine, with versions.
        dtype: of the tensors.
        backward: whether forward and backward were timed, or the forward only.
        matmul_tflops: the measured peak.
        shapes: each shape with a `Timing` per kernel.
    """

    machine: Mapping[str, Any]
    dtype: str
    backward: bool
    matmul_tflops: float
    shapes: tuple[tuple[Shape, tuple[Timing, ...]], ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; missing numbers are null."""
        return {
            "machine": dict(self.machine),
            "dtype": self.dtype,
            "backward": self.backward,
            "matmul_tflops": round(self.matmul_tflops, 2),
            "shapes": [
                {"shape": asdict(shape), "label": str(shape), "kernels": [_nan_to_none(asdict(t)) for t in timings]}
                for shape, timings in self.shapes
            ],
        }


def _nan_to_none(value: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in value.items()}


class Attention(torch.nn.Module):
    """An attention module on one kernel, as in a model."""

    is_causal = True

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.asked = kernel.split(":", maxsplit=1)[0]
        self.__dict__[ATTRIBUTE] = Route(self.asked, kernel, (kernel,), kernel)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: LazyMask) -> torch.Tensor:
        """``[B, S, H, D]``."""
        return attend(self.asked, self, q, k, v, mask)[0]


def mask_of(shape: Shape, device: str) -> LazyMask:
    """The mask of a shape, as an input hook would make it."""
    from transformers import masking_utils as mu

    function = mu.causal_mask_function
    if shape.window is not None:
        function = mu.sliding_window_causal_mask_function(shape.window)
    mask = lazy_mask(shape.rows, shape.length, shape.length, mask_function=function, device=device)
    mask.guarded = True
    if shape.documents is None:
        return mask
    edges = [0]
    for size in shape.documents:
        edges.append(edges[-1] + size)
    return mask.with_segments(Segments((tuple(edges),), torch.device(device)))


def usable_kernels(asked: Sequence[str] = ()) -> list[str]:
    """The kernels to time: the requested ones, else all that run on this machine; ``sdpa``, the baseline, always.

    Raises:
        UnknownAttentionError: a name that can't be timed alone.
    """
    unknown = [name for name in asked if name not in KERNELS]
    if unknown:
        advice = f"Kernels: {', '.join(KERNELS)}. Native names are timed with --model-step."
        raise UnknownAttentionError(f"{', '.join(unknown)} can't be timed alone", advice=advice)
    environment = Environment.current()
    found = list(asked) or [
        name
        for name in KERNELS
        if not backends.get(name).probe(environment) and not (name == "sage" and environment.triton_interpret)
    ]
    return [BASE, *(name for name in found if name != BASE)]


def bench(
    shapes: Sequence[Shape],
    *,
    kernels: Sequence[str] = (),
    backward: bool = False,
    rounds: int = 10,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bench:
    """Time all usable kernels side by side on some shapes.

    Args:
        shapes: see `Shape.parse` and `shapes_of`.
        kernels: names in `KERNELS`; empty for all that run here.
        backward: time forward and backward.
        rounds: timed calls per kernel, in turn, after three warm-up calls.
        dtype: None for bfloat16 on a GPU, float32 on a CPU.
        progress: called with each shape before it runs.

    Raises:
        InvalidInputError: `shapes` is not a list of `Shape`.
        UnknownAttentionError: a name that can't be timed alone.
    """
    if isinstance(shapes, str) or not shapes or not all(isinstance(shape, Shape) for shape in shapes):
        advice = 'Give [Shape.parse("1,32,8,8192,128")] or shapes_of(model, seq_len), of axattn.tools.bench.shapes.'
        raise InvalidInputError("shapes is not a list of shapes", advice=advice)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    names = usable_kernels(kernels)
    peak = matmul_tflops(device, kind)
    found = []
    for shape in shapes:
        if progress is not None:
            progress(str(shape))
        found.append((shape, tuple(_shape(shape, names, backward, rounds, kind, device, peak))))
    text = str(kind).removeprefix("torch.")
    return Bench(machine_description(), text, backward, peak, tuple(found))


def machine_description() -> dict[str, Any]:
    """This machine with library versions, and axattn's commit if it runs from a checkout."""
    root = Path(__file__).resolve().parents[3]
    commit = None
    if (root / ".git").exists():
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    return {"axattn": __version__, "commit": commit, **Environment.current().to_dict()}


def _shape(
    shape: Shape, names: list[str], backward: bool, rounds: int, dtype: torch.dtype, device: str, peak: float
) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for heads in (shape.heads, shape.kv_heads, shape.kv_heads):
        x = torch.randn(shape.rows, shape.length, heads, shape.head_dim, generator=generator).to(device, dtype)
        tensors.append(x.transpose(1, 2).requires_grad_())  # memory layout of models, [B, S, H, D]
    q, k, v = tensors
    target = torch.randn(shape.rows, shape.length, shape.heads, shape.head_dim, generator=generator).to(device, dtype)
    mask = mask_of(shape, device)
    makers = {name: _maker(Attention(name), q, k, v, mask) for name in names}

    def both(make: Callable[[], torch.Tensor]) -> Run:
        return lambda: torch.autograd.grad(make(), (q, k, v), target)

    candidates: dict[str, Run] = {n: both(m) if backward else _forward(m) for n, m in makers.items()}
    runs, failed = working(candidates)
    spent = timed(runs, rounds, device=device)
    errors = _errors({name: makers[name] for name in runs}, q, k, v, shape)
    flops = shape.flops() * (3.5 if backward else 1.0)
    timings = []
    for name in names:
        if name in failed:
            timings.append(Timing(name, failed=failed[name]))
            continue
        middle = statistics.median(spent[name])
        ratios = ratio_of(spent[name], spent[BASE] if BASE in runs else None)
        speed = flops / middle / 1e9
        spread = (max(spent[name]) - min(spent[name])) / middle
        memory = peak_bytes(runs[name])
        timings.append(Timing(name, middle, spread, *ratios, speed, speed / peak, memory, errors.get(name)))
    return timings


def _maker(module: Attention, q: Any, k: Any, v: Any, mask: LazyMask) -> Callable[[], torch.Tensor]:
    return lambda: module(q, k, v, mask)


def _forward(make: Callable[[], torch.Tensor]) -> Run:
    def run() -> None:
        with torch.no_grad():
            make()

    return run


@torch.no_grad()
def _errors(makers: dict[str, Callable[[], torch.Tensor]], q: Any, k: Any, v: Any, shape: Shape) -> dict[str, float]:
    """Relative error of the first row's last document against fp32 attention."""
    size = (shape.documents or (shape.length,))[-1]
    if size > 8192:
        return {}
    index = torch.arange(size, device=q.device)
    visible = index <= index[:, None]
    if shape.window is not None:
        visible &= index > index[:, None] - shape.window
    last_q, last_k, last_v = (x[:1, :, shape.length - size :].float() for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(last_q, last_k, last_v, visible, enable_gqa=True).transpose(1, 2)
    found = {}
    for name, make in makers.items():
        got = make()[:1, shape.length - size :].float()
        found[name] = ((got - wanted).norm() / wanted.norm()).item()
    return found
