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
    stems=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
    traced=True,
)
"""What every kernel of torch serves when axattn calls it; each backend adds its own features."""


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
    stems=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
)
"""What every FlashAttention library and hub kernel serves on CUDA; each backend adds its own features."""


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
    sinks=True,
    padding=True,
    segments=True,
    stems=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
    traced=True,
    refuses=(
        Refused("serves it in inference only", ("softcap", "gradient")),  # torch's flash backward has none
        Refused("serves no sinks under a softcap", ("sinks", "softcap")),
    ),
)
"""What every quantised kernel serves when axattn calls it; each backend adds its own features."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel that, by the definition in its paper, does not compute full attention in training.

    No exact kernel may replace it there, and its heads are not split over ranks, because a head's index may matter.

    Attributes:
        evaluates: the backend that runs instead in evaluation.
        reasons: ``(class name, config path, layer kinds)`` → why it can't serve a model.
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
        probe: every reason why a machine can't run it; empty if it can.
        forward: `AttentionCall` → output ``[B, S, H, Dv]``; None if only Transformers runs it.
        install: the command that installs it, or ``""``.
        on: its capability on a given machine, if that differs from `capability`.
        direct: ``(capability, machine)`` → its capability where axattn calls it, if that differs from the one where
            Transformers does.
        options: the ``kernel_options`` it takes.
        spans: it takes a mask's `Layout`; inside a compiled graph it runs as one operator.
        notice: a warning for the user, shown once, when it runs on a given machine; ``""`` for none.
        runs_on: for plans, whose kernels it calls on a given machine, with the source; ``""`` for nothing to add.
        patches: names in `axattn.loading.PATCHES` of further patches for a model that runs on it.
        variant: set if it does not compute full attention in training.
        forward_backward: its forward and backward as separate functions, for operators of compiled graphs:
            `AttentionCall` → `ForwardBackward`, or None for a call whose forward must run again in backward.
        is_sdpa: under a `LazyMask.as_flag` mask with no extras, `forward` is ``F.scaled_dot_product_attention``.
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
    direct: Callable[[Capability, Environment], Capability] | None = None

    def capability_on(self, environment: Environment) -> Capability:
        """Its capability on a machine, under a name that Transformers runs too: where Transformers runs it."""
        return self.capability if self.on is None else self.on(environment)

    def called_capability_on(self, environment: Environment) -> Capability:
        """Its capability on a machine where axattn calls it."""
        served = self.capability_on(environment)
        return served if self.direct is None else self.direct(served, environment)

    def called(self, call: AttentionCall) -> torch.Tensor:
        """`forward`: ``[B, S, H, Dv]``. No plan lets axattn call a backend that only Transformers runs."""
        if self.forward is None:
            raise AssertionError(f"only Transformers runs {self.name}")
        return self.forward(call)

    def option(self, call: AttentionCall, name: str) -> Any:
        """The user's value of an option, or its default."""
        return call.options.get(name, next(option.default for option in self.options if option.name == name))


def keep_nan(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """In training on a CPU: NaN where a query is not finite, as with eager.

    Torch's CPU flash kernel (2.13) returns 0 there: a ``q_proj`` that has diverged to NaN would go on training.
    Without gradients this is not checked; the result is then that of Transformers' own ``sdpa``.

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

    if math.isfinite(query.detach().sum().item()):  # torch.isfinite takes four operators
        return out
    bad = ~torch.isfinite(query.detach()).all(-1).transpose(1, 2)[..., None]
    return out + torch.zeros_like(bad, dtype=out.dtype).masked_fill(bad, float("nan"))


def on_gpu_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context that makes a tensor's GPU the current device; a null context on a CPU or if it is current already.

    Triton and libraries that set no device (sageattention 1.0.6, torchao's quantiser, xformers' split-K) launch on the
    current device and stream, which is the wrong GPU for layers that ``device_map`` has put on another one.
    """
    import torch

    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]  # torch's has no annotations


_HERE = contextlib.nullcontext()


def always_usable(environment: Environment) -> list[Reason]:
    """A probe that checks for torch only."""
    return [] if environment.has("torch") else [need_library("torch", "torch", environment, "pip install torch")]


def need_library(key: str, shown: str, environment: Environment, fix: str, minimum: str | None = None) -> Reason:
    """The reason for a library that is missing or older than `minimum`."""
    found = environment.libraries.get(key)
    if found is None:
        return Reason("library", f"{shown} is not installed", fix)
    return Reason("version", f"{shown} {found} is older than {minimum}", fix)


def check_library(
    reasons: list[Reason], key: str, shown: str, environment: Environment, fix: str, minimum: str | None = None
) -> None:
    """Add `need_library` to `reasons` unless the library is installed and new enough."""
    if not environment.has(key, minimum):
        reasons.append(need_library(key, shown, environment, fix, minimum))


def check_gpu(
    reasons: list[Reason], name: str, environment: Environment, *, minimum_sm: int, rocm: str | None = None
) -> None:
    """Add the reason if the machine's GPU, or having none, rules `name` out.

    Args:
        reasons: extended in place.
        name: kernel.
        environment: machine.
        minimum_sm: oldest NVIDIA architecture, such as 80 for Ampere.
        rocm: oldest ROCm version, None if AMD GPUs are not served.
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
