"""``fp8``: what FP8 attention (torchao's quantisers, FlashAttention 3's fp8 kernel) serves and needs."""

from __future__ import annotations

from axattn.backends.base import HALVES, Backend, check_gpu, check_library
from axattn.backends.pending import no_adapter
from axattn.capability import Capability
from axattn.environment import Environment
from axattn.errors import Reason

_INSTALL = "pip install torchao fa3-fwd"
CAPABILITY = Capability(
    exactness="lossy",
    devices=frozenset({"cuda"}),
    dtypes=HALVES,
    head_dims=frozenset({64, 128, 256}),
    grouped_heads=True,
    causal=True,
    bidirectional=True,
)


def requirements(environment: Environment) -> list[Reason]:
    """Every reason why this machine can't run fp8 attention, whatever this version of axattn can do."""
    reasons: list[Reason] = []
    check_gpu(reasons, "fp8", environment, minimum_sm=90)
    check_library(reasons, "torch", "torch", environment, "pip install -U torch", "2.11")
    check_library(reasons, "torchao", "torchao", environment, "pip install -U torchao", "0.17")
    if not environment.has("flash_attn_3") and not environment.has("fa3_fwd"):
        text = "no FlashAttention 3 package (flash-attn-3 or fa3-fwd) is installed"
        reasons.append(Reason("library", text, "pip install fa3-fwd"))
    return reasons


def _probe(environment: Environment) -> list[Reason]:
    return [no_adapter("fp8"), *requirements(environment)]


BACKENDS = (Backend("fp8", "FP8 attention: torchao and FlashAttention 3", CAPABILITY, _probe, install=_INSTALL),)
