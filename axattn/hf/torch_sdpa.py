"""Which kernels ``F.scaled_dot_product_attention`` can use, and how to exclude cuDNN's. No attention here.

torch's checks are in ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``; outside of graphs they are called.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from packaging.version import Version
from torch.nn.attention import SDPBackend, sdpa_kernel

from axattn.hf.torch_internals import is_tracing

switches: Any = torch.backends.cuda  # untyped

# ---- grouped heads ---------------------------------------------------------------------------------------------------


def takes_grouped_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float, causal: bool
) -> bool:
    """Whether a fused kernel serves a call with fewer KV heads under ``enable_gqa=True``; if not, MATH would run it.

    On a GPU torch's checks decide; in a graph, where they can't run, only what FlashAttention 2 serves is accepted.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, Dv]``.
        mask: ``[B|1, H|1, S|1, T]``, or None.
        dropout: probability of attention dropout.
        causal: ``is_causal``.
    """
    kind = query.device.type
    if kind in ("cpu", "xpu"):
        return True
    if kind == "mps":
        return _since_2_13()
    if kind == "cuda" and not is_tracing():
        return _torch_accepts(query, key, value, mask, dropout, causal)
    fits = mask is None and query.shape[-1] == value.shape[-1] <= 256
    if kind != "cuda":
        return fits
    return fits and query.dtype in (torch.float16, torch.bfloat16) and (sm(query.device) or 80) >= 80


def _torch_accepts(*call: Any) -> bool:
    params = switches.SDPAParams(*call, True)
    checks = (switches.can_use_flash_attention, switches.can_use_efficient_attention)
    # cuDNN serves grouped heads under a mask too, but is excluded from such calls
    return any(check(params) for check in checks) or (call[3] is None and switches.can_use_cudnn_attention(params))


def _since_2_13() -> bool:
    return Version(torch.__version__).release >= (2, 13)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.13
def sm(device: torch.device) -> int | None:
    """The architecture of a CUDA device, 90 for Hopper; None on ROCm."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


# ---- cuDNN -----------------------------------------------------------------------------------------------------------


def avoids_cudnn(device: torch.device, keys: int, *, masked: bool, single: bool, causal: bool, training: bool) -> bool:
    """Whether a call must not run on cuDNN's kernel, on GPUs where torch 2.11 prefers it (sm90, sm100 and kin).

    - With a mask or a single query: cuDNN builds a plan for every new shape, 0.15 s (unsloth) to 0.5 s (FunASR#3704)
      per direction, and the keys of such calls grow by one per step.
    - In training on Hopper, bidirectional calls over T keys with ``T % 128 == 64``: the last 64 keys of the 128-key
      tile don't exist and are not masked, so dq is NaN for a query whose logsumexp is below -88.7 (pytorch#196678 under
      a mask, trl#7181; cause: cudnn-frontend#628, fixed in 9.26). With a single query dk and dv are NaN, in 9.26 too
      (cudnn-frontend#1072). A causal mask hides those keys. There is no upper version bound: the test that would
      justify one, tests/e2e/test_gpu_sdpa.py, has not run on a fixed version.

    Args:
        device: of the call.
        keys: T.
        masked: whether it has a mask.
        single: whether S is 1.
        causal: ``is_causal``.
        training: whether gradients are on.
    """
    if device.type != "cuda":
        return False
    architecture = sm(device) or 0
    if not 90 <= architecture < 110:
        return False
    if masked or single:
        return True
    return architecture == 90 and not causal and training and (is_tracing() or keys % 128 == 64)


def without_cudnn() -> contextlib.AbstractContextManager[Any]:
    """A context for one call of ``F.scaled_dot_product_attention`` that must not run on cuDNN's kernel.

    torch's switches are per process, not per thread: ``sdpa_kernel`` in two threads at once (``nn.DataParallel``,
    checkpoints recomputed in autograd threads) can leave cuDNN off permanently. So all such calls share one counter:
    the first turns cuDNN off, the last turns it on again if it was on. A concurrent call of another thread runs on
    FlashAttention, which is correct. The priority order and the other switches stay as the user set them, and cuDNN
    stays on if no other kernel that supports masks is on. In a graph, whose kernels are chosen during tracing, this is
    ``sdpa_kernel``, which Dynamo supports.
    """
    if not torch.compiler.is_compiling():
        return _WITHOUT
    others = _remaining_kernels()
    return sdpa_kernel([getattr(SDPBackend, name) for name in others]) if others else contextlib.nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.13
def _remaining_kernels() -> tuple[str, ...]:
    """The kernels that may replace cuDNN's; none if cuDNN is off already, or if no kernel that supports masks is on."""
    on = {
        "FLASH_ATTENTION": switches.flash_sdp_enabled(),
        "EFFICIENT_ATTENTION": switches.mem_efficient_sdp_enabled(),
        "MATH": switches.math_sdp_enabled(),
    }
    if not switches.cudnn_sdp_enabled() or not (on["EFFICIENT_ATTENTION"] or on["MATH"]):
        return ()
    return tuple(name for name in on if on[name])


class _Without(contextlib.AbstractContextManager[None]):
    """See `without_cudnn`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active_calls = 0
        self._turned_off = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._active_calls:
                self._turned_off = bool(_remaining_kernels())
                if self._turned_off:
                    switches.enable_cudnn_sdp(False)
            self._active_calls += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._active_calls -= 1
            if not self._active_calls and self._turned_off:
                switches.enable_cudnn_sdp(True)


_WITHOUT = _Without()
