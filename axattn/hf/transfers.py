"""Copies host tensors to a device without synchronising, and detects CUDA graph capture."""

from __future__ import annotations

import torch


def on_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`.

    ``.to`` from unpinned memory would wait for all queued work of the GPU.
    """
    if device.type != "cuda" or captures_graph():
        return x.to(device)  # raises in a capture: a replay would copy from pinned memory that has been reused
    return x.pin_memory().to(device, non_blocking=True)


def captures_graph() -> bool:
    """Whether a CUDA graph is being captured in this thread. It records addresses: tensors that it reads must not come
    from a cache that evicts."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # untyped in torch
    return initialized and torch.cuda.is_current_stream_capturing()
