"""``flex_attention``: what it serves and needs. Transformers runs it; axattn checks first."""

from __future__ import annotations

import dataclasses
import shutil

from axattn.backends.base import TORCH_KERNEL, Backend, check_library
from axattn.environment import Environment
from axattn.errors import Reason

CAPABILITY = dataclasses.replace(
    TORCH_KERNEL,
    softcap=True,
    sinks=True,
    weights=True,
    notes={"gradient": "on a GPU; torch's CPU kernel is forward only"},
)


def _probe(environment: Environment) -> list[Reason]:
    reasons: list[Reason] = []
    check_library(reasons, "torch", "torch", environment, "pip install -U torch", "2.6")
    if environment.device == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        reasons.append(Reason("compiler", "no C++ compiler, which torch's CPU code generator needs", "install g++"))
    return reasons


BACKENDS = (Backend("flex_attention", "torch flex_attention, run by Transformers", CAPABILITY, _probe),)
