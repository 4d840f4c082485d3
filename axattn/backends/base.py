"""What a backend is: a name, a `Capability`, a probe of the machine and a forward. No kernel lives here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from axattn.errors import Reason
from axattn.machine.environment import Environment
from axattn.spec.capability import Capability, Refused
from axattn.spec.options import Option

if TYPE_CHECKING:
    import torch

    from axattn.backends.call import AttentionCall
    from axattn.backends.varlen_engine.forward_backward import ForwardBackward

FLOATS = frozenset({"float32", "float64", "bfloat16", "float16"})
HALVES = frozenset({"bfloat16", "float16"})

TORCH_KERNEL = Capability(
    devices=frozenset({"cpu", "cuda"}),
    dtypes=FLOATS,
    value_dim_differs=True,
    grouped_heads=True,
    causal=True,
    bidirectional=True,
    window=True,
    chunk=True,
    padding=True,
    non_contiguous_padding=True,
    segments=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
    traced=True,
)
"""What all of torch's own kernels serve, called by axattn; each adds what it has beyond."""


FLASH_KERNEL = Capability(
    devices=frozenset({"cuda"}),
    dtypes=HALVES,
    max_head_dim=256,
    head_dim_multiple=8,
    value_dim_differs=True,
    value_dim_padded=True,
    grouped_heads=True,
    causal=True,
    bidirectional=True,
    window=True,
    padding=True,
    segments=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
)
"""What all FlashAttention libraries and hub kernels serve on CUDA; each adds what it has beyond."""


QUANTISED = Capability(
    exactness="lossy",
    devices=frozenset({"cuda"}),
    dtypes=HALVES,
    max_head_dim=256,
    value_dim_differs=True,
    value_dim_padded=True,
    grouped_heads=True,
    causal=True,
    bidirectional=True,
    chunk=True,
    softcap=True,
    padding=True,
    segments=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
    traced=True,
    refuses=(Refused("serves it in inference only", ("softcap", "gradient")),),  # torch's flash backward has none
)
"""What kernels over quantised documents serve, called by axattn; each adds what it has beyond."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel that computes something else than full attention in training, by definition of its paper.

    Nothing exact may stand in for it there, and its heads, which may differ by their number, are not split over ranks.

    Attributes:
        evaluates: the backend that runs in its place in evaluation.
        reasons: why it can't serve a model: of its class name, the path of the config and the kinds of its layers.
    """

    evaluates: str
    reasons: Callable[[str, str, Collection[str]], list[Reason]]


@dataclass(frozen=True, slots=True)
class Backend:
    """One kernel.

    Attributes:
        name: canonical name.
        summary: one line for tables.
        capability: what it serves.
        probe: every reason why a machine can't run it; empty when it can.
        forward: `AttentionCall` → output ``[B, S, H, Dv]``; None when only Transformers runs the name.
        install: the command that installs it, or ``""``.
        on: what it serves on a given machine, where that differs from `capability`.
        options: what its user can choose (``kernel_options``).
        spans: it reads a mask's `Layout` and no sinks: inside a compiled graph it runs as one operator.
        notice: what to tell the user once where it runs on a given machine, ``""`` for nothing.
        runs_on: whose kernels it calls on a given machine, by which source, for plans; ``""`` for nothing to add.
        patches: by name in `axattn.loading.PATCHES`, further patches of a model that runs on it.
        variant: where it computes something else than full attention in training, what; None for all other kernels.
        forward_backward: its forward and backward apart, for operators of compiled graphs: `AttentionCall` →
            `ForwardBackward`, or None for a call whose forward must run again in backward.
        is_sdpa: on a `LazyMask.as_flag` mask with no extras, `forward` is just ``F.scaled_dot_product_attention``.
    """

    name: str
    summary: str
    capability: Capability
    probe: Callable[[Environment], list[Reason]]
    forward: Callable[[AttentionCall], torch.Tensor] | None = None
    install: str = ""
    is_sdpa: bool = False
    on: Callable[[Environment], Capability] | None = None
    options: tuple[Option, ...] = ()
    patches: tuple[str, ...] = ()
    spans: bool = False
    variant: Variant | None = None
    notice: Callable[[Environment], str] | None = None
    runs_on: Callable[[Environment], str] | None = None
    forward_backward: Callable[[AttentionCall], ForwardBackward | None] | None = None

    def capability_on(self, environment: Environment) -> Capability:
        """What it serves on a machine."""
        return self.capability if self.on is None else self.on(environment)

    def called(self, call: AttentionCall) -> torch.Tensor:
        """`forward`, ``[B, S, H, Dv]``; of a backend that only Transformers runs no plan lets axattn call it."""
        if self.forward is None:
            raise AssertionError(f"{self.name} is run by Transformers alone")
        return self.forward(call)

    def option(self, call: AttentionCall, name: str) -> Any:
        """What the user chose for `name`, its default if nothing."""
        return call.options.get(name, next(option.default for option in self.options if option.name == name))


def keep_nan(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """In training on a CPU: NaN where a query is not finite, as eager gives.

    Torch's CPU flash kernel (2.13) gives 0 there: a ``q_proj`` that has diverged to NaN would train on in silence.
    Without gradients this is not looked for; the result is then that of Transformers' own ``sdpa``.

    Args:
        out: ``[B, S, H, Dv]``.
        query: ``[B, H, S, D]``.
    """
    import torch

    from axattn.hf.torch_internals import is_tracing

    if query.device.type != "cpu" or not torch.is_grad_enabled() or is_tracing():
        return out
    return nan_where_not_finite(out, query)


def nan_where_not_finite(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, Dv]`` with NaN where the query ``[B, H, S, D]`` is not finite."""
    import torch

    if math.isfinite(query.detach().sum().item()):  # torch.isfinite is four operators
        return out
    bad = ~torch.isfinite(query.detach()).all(-1).transpose(1, 2)[..., None]
    return out + torch.zeros_like(bad, dtype=out.dtype).masked_fill(bad, float("nan"))


def on_gpu_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which the GPU of a tensor is the current one; nothing on a CPU, or where it is that already.

    Triton, and libraries that set no device themselves (sageattention 1.0.6, torchao's quantiser, xformers' split-K),
    launch on the current device and stream, which are those of another GPU for layers that ``device_map`` has put
    elsewhere.
    """
    import torch

    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]  # torch's has no annotations


_HERE = contextlib.nullcontext()


def always_usable(environment: Environment) -> list[Reason]:
    """A probe with nothing to check beyond torch itself."""
    return [] if environment.has("torch") else [need_library("torch", "torch", environment, "pip install torch")]


def need_library(key: str, shown: str, environment: Environment, fix: str, minimum: str | None = None) -> Reason:
    """The reason for a library that is absent or older than `minimum`."""
    found = environment.libraries.get(key)
    if found is None:
        return Reason("library", f"{shown} is not installed", fix)
    return Reason("version", f"{shown} {found} is older than {minimum}", fix)


def check_library(
    reasons: list[Reason], key: str, shown: str, environment: Environment, fix: str, minimum: str | None = None
) -> None:
    """Add `need_library` to `reasons` unless the library is there and new enough."""
    if not environment.has(key, minimum):
        reasons.append(need_library(key, shown, environment, fix, minimum))


def check_gpu(
    reasons: list[Reason], name: str, environment: Environment, *, minimum_sm: int, rocm: str | None = None
) -> None:
    """Add the reason why the machine's GPU (or its absence) rules `name` out.

    Args:
        reasons: extended in place.
        name: kernel.
        environment: machine.
        minimum_sm: oldest NVIDIA architecture, such as 80 for Ampere.
        rocm: oldest ROCm version, None when AMD GPUs are not served.
    """
    from packaging.version import Version

    if environment.device == "cuda":
        if environment.sm is not None and environment.sm < minimum_sm:
            text = f"{environment.gpu or 'the GPU'} is sm{environment.sm}, {name} needs sm{minimum_sm} or newer"
            reasons.append(Reason("gpu", text))
    elif environment.device == "rocm" and rocm is not None:
        found = (environment.rocm or "0").split("-")[0]
        if Version(found) < Version(rocm):
            fix = f"install a torch build for ROCm {rocm} or newer"
            reasons.append(Reason("version", f"ROCm {found} is older than {rocm}", fix))
    else:
        kind = f"an NVIDIA GPU (sm{minimum_sm} or newer)" + (f" or an AMD GPU with ROCm {rocm}+" if rocm else "")
        reasons.append(Reason("gpu", f"{name} needs {kind}; this machine has {environment.describe()}"))
