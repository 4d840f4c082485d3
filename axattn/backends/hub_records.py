"""Data about known hub kernels, taken from their code; `axattn.backends.hub` makes backends of it.

Source: the code that the kernels are built from (github.com/huggingface/kernels-community), July to September 2026:
signatures, checks, and what a backward returns. Devices and versions are those that Transformers 5.24 lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from axattn.backends.base import FLASH_KERNEL, HALVES
from axattn.spec.capability import Capability, Refused


@dataclass(frozen=True, slots=True)
class Broken:
    """Revisions of a kernel that compute wrong results or raise.

    Attributes:
        revisions: branches, and prefixes of commit ids.
        refused: the needs for which they are refused.
        fixed: builds (suffixes of the kernel's own name) that have the fix, whatever the revision.
        source: where the fault is described.
    """

    revisions: tuple[str, ...]
    refused: Refused
    fixed: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class HubKernel:
    """A repository on the hub.

    Attributes:
        summary: one line for tables.
        serves: what it serves, by `axattn.Environment.device`; other devices have no build.
        lacks: features that older versions lack, by revision.
        narrower: fields of the record that differ on an NVIDIA architecture, by its first digits (10 for sm100).
        sms: the NVIDIA architectures it runs on, both ends included.
        packages: what its build imports besides torch: key of ``Environment.libraries`` → name of the package.
        broken: known bad revisions.
        source: where the record was read.
    """

    summary: str
    serves: Mapping[str, Capability]
    source: str
    lacks: Mapping[str, frozenset[str]] = field(default_factory=dict)
    narrower: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    sms: tuple[int, int] | frozenset[int] = (80, 129)
    packages: Mapping[str, str] = field(default_factory=dict)
    broken: tuple[Broken, ...] = ()

    def runs_on(self, sm: int) -> bool:
        """Whether it has code for an NVIDIA architecture, such as 90."""
        return sm in self.sms if isinstance(self.sms, frozenset) else self.sms[0] <= sm <= self.sms[1]

    def shown_sms(self) -> str:
        """The architectures as text: ``sm80 to sm90``."""
        if isinstance(self.sms, frozenset):
            return ", ".join(f"sm{sm}" for sm in sorted(self.sms))
        return f"sm{self.sms[0]} or newer" if self.sms[1] >= 129 else f"sm{self.sms[0]} to sm{self.sms[1]}"


_FLASH = FLASH_KERNEL
_SINKS = (
    Refused("has no gradient for the sinks", ("sinks", "gradient")),
    Refused("takes sinks in bfloat16 only", ("sinks",), dtypes=frozenset({"float16"})),
)

UNKNOWN = dataclasses.replace(
    _FLASH,
    devices=frozenset({"cuda", "cpu", "xpu"}),
    dtypes=HALVES | {"float32"},
    head_dim_multiple=1,
    value_dim_differs=False,
    value_dim_padded=False,
)
"""What is assumed about an unknown repository; its signature is checked when it is loaded."""

_FLASH_2 = dataclasses.replace(_FLASH, softcap=True, dropout=True)
_FLASH_2_ON_CPU = dataclasses.replace(_FLASH, devices=frozenset({"cpu"}), window=False, gradient=False)
"""Its CPU build takes softcap and dropout but ignores both; windows raise; there is no backward."""
_FLASH_2_ON_XPU = dataclasses.replace(_FLASH, devices=frozenset({"xpu"}), dropout=True)
"""Its XPU build takes softcap but ignores it."""

_FLASH_3 = dataclasses.replace(_FLASH, softcap=True)
_FLASH_3_SINKS = dataclasses.replace(
    _FLASH_3,
    sinks=True,
    refuses=_SINKS,
    notes={"sinks": "on Hopper, up to 64 query heads"},
)
_FLASH_4 = dataclasses.replace(
    _FLASH,
    softcap=True,
    sinks=True,
    refuses=(*_SINKS, Refused("has no softcap in backward", ("softcap", "gradient"))),
)
_AITER = dataclasses.replace(
    _FLASH,
    sinks=True,
    dropout=True,
    refuses=(Refused("has bidirectional windows only without sinks", ("window", "bidirectional", "sinks")),),
)
_METAL = Capability(
    devices=frozenset({"mps"}),
    dtypes=HALVES | {"float32"},
    head_dims=frozenset({32, 64, 72, 80, 96, 128, 192, 256}),
    value_dim_differs=True,
    value_dim_padded=True,
    grouped_heads=True,
    causal=True,
    bidirectional=True,
    window=True,
    softcap=True,
    sinks=True,
    padding=True,
    segments=True,
    cross_lengths=True,
)

_GROUPED_BACKWARD = Broken(
    ("v3", "a394b68d"),
    Refused(
        "v3 raises in the backward of grouped heads in builds before 2026-09-01",
        ("grouped_heads", "gradient"),
        fix="kernels-community/flash-attn2@v4, or @v2 where torch has a build of it",
    ),
    fixed=("4eec01c",),
    source="github.com/huggingface/kernels-community/issues/1085",
)

FLASH: Mapping[str, HubKernel] = {
    "kernels-community/flash-attn2": HubKernel(
        "FlashAttention 2",
        {"cuda": _FLASH_2, "xpu": _FLASH_2_ON_XPU, "cpu": _FLASH_2_ON_CPU},
        "flash-attn2/: flash_attn_interface.py, flash_attn_cpu/flash_api.cpp, flash_attn_xpu/flash_api.cpp",
        broken=(_GROUPED_BACKWARD,),
    ),
    "kernels-community/flash-attn3": HubKernel(
        "FlashAttention 3", {"cuda": _FLASH_3}, "flash-attn3/: flash_attn_interface.py, build.toml", sms=(80, 90)
    ),
    "kernels-community/vllm-flash-attn3": HubKernel(
        "FlashAttention 3 of vLLM, with sinks",
        {"cuda": _FLASH_3_SINKS},
        "vllm-flash-attn3/: flash_attn_interface.py, flash_api_stable.cpp",
        narrower={8: {"sinks": False}},
        sms=(80, 90),
    ),
    "kernels-community/flash-attn4": HubKernel(
        "FlashAttention 4 (4.0.0.beta8)",
        {"cuda": _FLASH_4},
        "flash-attn4/: interface.py",
        # it serves (192, 128) on sm100 too, but Transformers widens values to the query heads' size
        narrower={
            10: {"max_head_dim": 128},
            11: {"max_head_dim": 128},
            12: {"max_head_dim": 128, "sinks": False, "deterministic": False},
        },
        sms=(90, 129),
        packages={"nvidia_cutlass_dsl": "nvidia-cutlass-dsl"},
    ),
    "kernels-community/aiter-flash-attn": HubKernel(
        "AITER's FlashAttention in Triton, with sinks",
        {"rocm": _AITER},
        "aiter-flash-attn/: mha.py",
        lacks={"v1": frozenset({"sinks"})},  # its argument is `sink`, which Transformers does not pass
    ),
    "kernels-community/metal-flash-sdpa": HubKernel(
        "Metal, after MLX",
        {"mps": _METAL},
        "metal-flash-sdpa/: README.md, _custom_ops.py",
        lacks={"v1": frozenset({"window", "softcap", "sinks"})},
    ),
}
"""Kernels that Transformers runs through its flash attention path."""
