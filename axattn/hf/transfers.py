"""Tensors of the host on a device, without waiting for it; and whether they may be kept: a CUDA graph is captured."""

from __future__ import annotations

import torch


def on_device(made: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`.

    ``.to`` alone, from memory that is not pinned, waits until the GPU has done all that it was given before.
    """
    if device.type != "cuda" or captures_graph():
        return made.to(device)  # a graph would replay the copy from pinned memory that others use by then: this raises
    return made.pin_memory().to(device, non_blocking=True)


def captures_graph() -> bool:
    """Whether a CUDA graph is being captured in this thread. It holds addresses: no tensor that it reads may come from
    a cache that forgets."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's has no types
    return begun and torch.cuda.is_current_stream_capturing()
