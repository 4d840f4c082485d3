"""``xformers``: what memory-efficient attention serves and needs."""

from __future__ import annotations

from axattn.backends.base import HALVES, Backend, check_gpu, check_library
from axattn.backends.pending import no_adapter
from axattn.capability import Capability
from axattn.environment import Environment
from axattn.errors import Reason

_INSTALL = "pip install xformers"
CAPABILITY = Capability(
    devices=frozenset({"cuda"}),
    dtypes=HALVES | {"float32"},
    max_head_dim=256,
    head_dim_multiple=8,
    value_dim_differs=True,
    grouped_heads=True,
    causal=True,
    bidirectional=True,
    window=True,
    dropout=True,
    padding=True,
    segments=True,
    cross_lengths=True,
    gradient=True,
)


def _probe(environment: Environment) -> list[Reason]:
    reasons = [no_adapter("xformers")]
    check_gpu(reasons, "xformers", environment, minimum_sm=70)
    check_library(reasons, "xformers", "xformers", environment, _INSTALL, "0.0.35")
    return reasons


BACKENDS = (Backend("xformers", "xformers memory-efficient attention", CAPABILITY, _probe, install=_INSTALL),)
