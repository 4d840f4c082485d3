"""``flash_attention_2/3/4``: what they serve and need.

If one serves a whole model, Transformers runs it once axattn has checked it; else `axattn.backends.flash_calls` does.
"""

from __future__ import annotations

import dataclasses

from axattn.backends.base import FLASH_KERNEL, Backend, check_gpu, check_library
from axattn.backends.flash_calls import flash_2, flash_3, flash_4
from axattn.errors import Reason
from axattn.machine.environment import Environment
from axattn.spec.capability import Capability, Refused

_SINKS_NOTE = "called by axattn, from the kernel's logsumexp"
_COMMON = dataclasses.replace(FLASH_KERNEL, softcap=True)
_MINIMUM_4 = (("nvidia_cutlass_dsl", "nvidia-cutlass-dsl", "4.6.2"), ("quack_kernels", "quack-kernels", "0.5.3"))
"""From the metadata of flash-attn-4 4.0.0b36."""
_INSTALL = {
    2: "pip install flash-attn --no-build-isolation",
    3: "build hopper/ of the flash-attention repository (no package on the registry)",
    4: "pip install --pre flash-attn-4",
}


def _probe_2(environment: Environment) -> list[Reason]:
    reasons: list[Reason] = []
    check_gpu(reasons, "flash_attention_2", environment, minimum_sm=80, rocm="6.0")
    fix = f"{_INSTALL[2]} (compiled from source, which can take an hour; MAX_JOBS=4 bounds its memory)"
    check_library(reasons, "flash_attn", "flash-attn", environment, fix, "2.3.3")
    return reasons


def _probe_3(environment: Environment) -> list[Reason]:
    reasons: list[Reason] = []
    check_gpu(reasons, "flash_attention_3", environment, minimum_sm=90)
    if environment.sm is not None and environment.sm >= 100:
        text = f"{environment.gpu or 'the GPU'} is sm{environment.sm}, and flash_attention_3 is built for Hopper (sm90)"
        reasons.append(Reason("gpu", text, "flash_attention_4"))
    check_library(reasons, "flash_attn_3", "flash-attn-3", environment, _INSTALL[3])
    return reasons


def _probe_4(environment: Environment) -> list[Reason]:
    reasons: list[Reason] = []
    check_gpu(reasons, "flash_attention_4", environment, minimum_sm=90)
    check_library(reasons, "flash_attn_4", "flash-attn-4", environment, _INSTALL[4])
    if environment.has("flash_attn_4"):
        for key, shown, minimum in _MINIMUM_4:
            check_library(reasons, key, shown, environment, f'pip install -U "{shown}>={minimum}"', minimum)
        if environment.flash_attn_4_shadowed:
            text = "the flash_attn/cute of the flash-attn package (FlashAttention 2) shadows that of flash-attn-4"
            reasons.append(Reason("library", text, "pip install --pre --force-reinstall --no-deps flash-attn-4"))
    return reasons


TWO = dataclasses.replace(
    _COMMON,
    dropout=True,
    traced=True,
    refuses=(Refused("serves no dropout under a softcap", ("softcap", "dropout")),),
    notes={
        "softcap": "from flash-attn 2.6 on; not on AMD GPUs",
        "sinks": f"{_SINKS_NOTE}, from flash-attn 2.8 on; not on AMD GPUs",
    },
)
THREE = dataclasses.replace(
    _COMMON,
    traced=True,
    refuses=(Refused("takes deterministic=True, but not every build of hopper/ is deterministic", ("deterministic",)),),
    notes={"sinks": _SINKS_NOTE},
)
FOUR = dataclasses.replace(_COMMON, sinks=True)
FOUR_ON_BLACKWELL = dataclasses.replace(
    FOUR,
    max_head_dim=128,
    head_dim_pairs=frozenset({(256, 256)}),
    refuses=tuple(
        Refused("serves it in inference only on sm100 to sm110", (feature, "gradient"), head_dims=(129, 256))
        for feature in ("window", "softcap", "sinks")
    ),
)
"""flash-attn-4 4.0.0b36 on sm100, sm103 and sm110 (``flash_attn/cute/interface.py``): up to 128, and 256 for both
(``_validate_head_dims``), with its own backward (``sm100_hd256_2cta_fmha_backward.py``) that has no window, softcap or
sinks. It serves (192, 128) too, but Transformers widens values to the query heads' size, and it has no (192, 192)."""
FOUR_ON_SM120 = dataclasses.replace(
    FOUR,
    max_head_dim=192,
    sinks=False,
    deterministic=False,
    refuses=(Refused("needs more than sm120's 99 KiB of shared memory there", ("gradient",), head_dims=(161, 192)),),
)
"""The same on sm120 and sm121: Ampere's kernels (``flash_fwd.py``, ``flash_bwd.py``), which have no sinks. Their tile
sizes are fixed, and their ``can_implement``, which leaves out the scores, is not called. The forward pads heads to
multiples of 16 and fits up to 192; the backward pads to multiples of 32, fits at 160 and needs 115,712 of 101,376 bytes
at 192, and asserts that ``deterministic`` is off."""


_NO_DROPOUT_BACKWARD = Refused(
    "has no backward with dropout for it on this GPU", ("dropout", "gradient"), head_dims=(193, 256)
)
"""It needs more than the 99 KB of shared memory there: no kernel runs, and the gradients are uninitialised memory
(flash-attn 2.8.3, ``flash_bwd_launch_template.h``)."""
_TRITON = "ignores it: under FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE flash-attn runs its Triton kernels for AMD GPUs"
_UNSET = "unset FLASH_ATTENTION_TRITON_AMD_ENABLE and install flash-attn with its CK kernels"
ON_TRITON = dataclasses.replace(
    TWO,
    refuses=(
        Refused(_TRITON, ("window",), fix=_UNSET),
        Refused(_TRITON, ("softcap",)),
        Refused(f"{_TRITON}, which drops the same weights in every call", ("dropout",), fix=_UNSET),
    ),
)
"""flash-attn 2.8.3 (``flash_attn_triton_amd/interface_fa.py``): window and softcap are printed but not used, and
the dropout seed is a constant."""
ON_CK = dataclasses.replace(
    TWO, refuses=(Refused("ignores it: flash-attn's CK kernels for AMD GPUs have none", ("softcap",)),)
)
"""flash-attn 2.8.3 (``csrc/flash_attn_ck/mha_*.cpp``): its functions take a softcap and do not read it."""


def _capability_2(environment: Environment) -> Capability:
    served = TWO
    if environment.flash_attn_triton:
        served = ON_TRITON
    elif environment.device == "rocm":
        served = ON_CK
    if environment.sm in (86, 89, 120, 121):
        served = dataclasses.replace(served, refuses=(*served.refuses, _NO_DROPOUT_BACKWARD))
    old = environment.has("flash_attn") and not environment.has("flash_attn", "2.4.1")
    return dataclasses.replace(served, softcap=environment.has("flash_attn", "2.6"), deterministic=not old)


def _capability_4(environment: Environment) -> Capability:
    family = (environment.sm or 0) // 10
    return FOUR_ON_BLACKWELL if family in (10, 11) else FOUR_ON_SM120 if family == 12 else FOUR


_NO_SINKS = Refused("serves no dropout with sinks", ("sinks", "dropout"))


def _called_2(served: Capability, environment: Environment) -> Capability:
    """Sinks from flash-attn 2.8 on (older ones lay out the logsumexp of packed rows otherwise), not on AMD GPUs."""
    if environment.device == "rocm" or environment.flash_attn_triton or not environment.has("flash_attn", "2.8"):
        return served
    return dataclasses.replace(served, sinks=True, refuses=(*served.refuses, _NO_SINKS))


def _called_3(served: Capability, _: Environment) -> Capability:
    return dataclasses.replace(served, sinks=True)


BACKENDS = (
    Backend(
        "flash_attention_2",
        "FlashAttention 2, run by Transformers",
        TWO,
        _probe_2,
        flash_2,
        install=_INSTALL[2],
        spans=True,
        on=_capability_2,
        direct=_called_2,
    ),
    Backend(
        "flash_attention_3",
        "FlashAttention 3, run by Transformers",
        THREE,
        _probe_3,
        flash_3,
        install=_INSTALL[3],
        spans=True,
        direct=_called_3,
    ),
    Backend(
        "flash_attention_4",
        "FlashAttention 4, run by Transformers",
        FOUR,
        _probe_4,
        flash_4,
        install=_INSTALL[4],
        on=_capability_4,
    ),
)
