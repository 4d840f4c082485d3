"""Which implementation torch's flash operators use, on a machine and in this process. Pure: no operator is called."""

from __future__ import annotations

from axattn.errors import Reason
from axattn.machine.environment import Environment

_SHOWN = {"FA3": "FlashAttention 3", "FA4": "FlashAttention 4"}
_SERVES = {"FA3": (9,), "FA4": (9, 10)}
"""Major architectures that torch's overrides accept (torch 2.13, ``torch/nn/attention/_fa3.py`` and ``_fa4.py``)."""
_RESTORE = "torch.nn.attention.restore_flash_attention_impl()"


def runs_on(environment: Environment) -> str:
    """Which kernels `varlen` runs for packed and whole rows, with the source; ``""`` without an NVIDIA GPU."""
    if environment.device != "cuda" or environment.sm is None:
        return ""
    impl = environment.flash_impl
    flash = _SHOWN.get(impl, impl) if impl else "FlashAttention 2"
    packed = f"{flash}, which torch ships (torch/nn/attention/varlen.py)"
    if impl:
        packed = f"{flash}, which this process has activated (torch.nn.attention.activate_flash_attention_impl)"
    elif environment.has("torch", "2.15") and environment.sm in (90, 100):
        packed = f"cuDNN or {flash}, as torch/nn/attention/varlen.py chooses"
    order = [flash, "memory-efficient attention"]
    if environment.sm in (90, 100):
        order.insert(0, "cuDNN")
    if environment.sm < 80:
        return "varlen: memory-efficient attention, packed rows document by document (torch's flash kernels need sm80)"
    return (
        f"varlen: packed rows run on {packed}; whole rows on the first that serves them of {', '.join(order)} "
        "(aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)"
    )


def unusable(environment: Environment) -> list[Reason]:
    """Why torch's flash operators fail: the implementation that this process has activated does not run here.

    axattn never switches it: ``activate_flash_attention_impl`` affects the whole process.
    """
    impl = environment.flash_impl
    if impl is None or environment.architecture is None:
        return []
    active = f"torch's flash kernels are {_SHOWN.get(impl, impl)} in this process (activate_flash_attention_impl)"
    if environment.architecture[0] not in _SERVES.get(impl, (environment.architecture[0],)):
        served = " and ".join(f"sm{major}x" for major in _SERVES[impl])
        return [Reason("gpu", f"{active}, which torch runs on {served} only", _RESTORE)]
    if impl == "FA4" and not environment.has("torch", "2.14"):
        # torch 2.13 unpacks two values; `_flash_attn_fwd` of flash-attn-4 4.0.0b36 returns five
        text = f"{active}, and torch {environment.libraries.get('torch')} can't call flash-attn-4 (torch 2.14 can)"
        return [Reason("version", text, _RESTORE)]
    return []
