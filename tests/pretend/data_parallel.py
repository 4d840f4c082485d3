"""``nn.DataParallel`` over pretended GPUs: its copies between devices are C++ for CUDA; its threads are its own."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.parallel import _functions, comm

from tests.pretend.tensors import modes


@contextlib.contextmanager
def data_parallel() -> Iterator[None]:
    """In this block (of `two_gpus`) ``torch.nn.DataParallel`` splits batches over both."""

    def at(x: torch.Tensor, device: Any) -> torch.Tensor:
        return x.to(f"cuda:{torch._utils._get_device_index(device, True) if device is not None else 0}")

    def added(inputs: Any, destination: Any = None, buffer_size: int = 0) -> Any:
        return tuple(sum(at(x, destination) for x in group) for group in zip(*inputs, strict=True))

    copies: dict[str, Any] = {
        "broadcast_coalesced": lambda tensors, devices, size=0: [[at(x, d) for x in tensors] for d in devices],
        "reduce_add_coalesced": added,
        "scatter": lambda x, devices, sizes=None, dim=0, streams=None: tuple(
            at(part, d) for part, d in zip(x.chunk(len(devices), dim), devices, strict=False)
        ),
        "gather": lambda tensors, dim=0, destination=None: torch.cat([at(x, destination) for x in tensors], dim),
    }

    class Thread(threading.Thread):
        def run(self) -> None:
            with modes():  # dispatch modes are of one thread
                super().run()

    splits, applies = (sys.modules[f"torch.nn.parallel.{name}"] for name in ("data_parallel", "parallel_apply"))
    with pytest.MonkeyPatch.context() as patch:
        for name, copy in copies.items():
            patch.setattr(comm, name, copy)
        patch.setattr(_functions, "_get_stream", lambda device: None)
        patch.setattr(splits, "_get_available_device_type", lambda: "cuda")
        patch.setattr(splits, "_check_balance", lambda ids: None)
        patch.setattr(applies, "threading", types.SimpleNamespace(Thread=Thread, Lock=threading.Lock))
        patch.setattr(torch._utils, "_get_available_device_type", lambda: "cuda")
        yield
