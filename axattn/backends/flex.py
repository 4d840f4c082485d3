"""``flex_attention``: what it serves and needs. Transformers runs it; axattn checks it first."""

from __future__ import annotations

import dataclasses
import shutil

from axattn.backends.base import TORCH_KERNEL, Backend, check_library
from axattn.errors import Reason
from axattn.machine.environment import Environment
from axattn.spec.capability import Capability

CAPABILITY = dataclasses.replace(
    TORCH_KERNEL,
    softcap=True,
    sinks=True,
    stems=False,
    notes={"": "on a CPU: no gradient, no attention sinks, no chunks, no decoding from a cache"},
)
ON_CPU = dataclasses.replace(CAPABILITY, sinks=False, chunk=False, gradient=False, cross_lengths=False)
"""Torch 2.13's CPU kernel: backward raises NotImplementedError; chunks, and fewer queries than keys, are C++ errors.
Transformers 5.23 raises for attention sinks."""


def _probe(environment: Environment) -> list[Reason]:
    reasons: list[Reason] = []
    check_library(reasons, "torch", "torch", environment, "pip install -U torch", "2.6")
    if environment.device == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        reasons.append(Reason("compiler", "no C++ compiler, which torch's CPU code generator needs", "install g++"))
    return reasons


def _capability(environment: Environment) -> Capability:
    return ON_CPU if environment.torch_device == "cpu" else CAPABILITY


BACKENDS = (
    Backend(
        "flex_attention",
        "torch flex_attention, run by Transformers",
        CAPABILITY,
        _probe,
        on=_capability,
        patches=("recompile limit",),
    ),
)
