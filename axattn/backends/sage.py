"""``sage``: what INT8 SageAttention serves and needs."""

from __future__ import annotations

from axattn.backends.base import HALVES, Backend, check_gpu, check_library
from axattn.backends.pending import no_adapter
from axattn.capability import Capability
from axattn.environment import Environment
from axattn.errors import Reason

_INSTALL = "pip install sageattention"
CAPABILITY = Capability(
    exactness="lossy",
    devices=frozenset({"cuda"}),
    dtypes=HALVES,
    head_dims=frozenset({64, 96, 128}),
    grouped_heads=True,
    causal=True,
    bidirectional=True,
    segments=True,
)


def _probe(environment: Environment) -> list[Reason]:
    reasons = [no_adapter("sage")]
    check_gpu(reasons, "sage", environment, minimum_sm=80)
    check_library(reasons, "sageattention", "sageattention", environment, _INSTALL, "1.0.6")
    return reasons


BACKENDS = (Backend("sage", "SageAttention, INT8", CAPABILITY, _probe, install=_INSTALL),)
