"""Several processes on one machine with gloo: `run` gives each a rank and brings back what they return."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
from pathlib import Path
from typing import Any

from tests import forked


def run(world: int, function: Any, *arguments: Any, timeout: float = 420) -> list[Any]:
    """Call a module-level function in `world` processes that share a gloo group; what each returned, by rank.

    Raises:
        AssertionError: a process failed; with its traceback.
    """
    number = str(world)
    environment = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        job = (str(Path(folder) / "store"), world, function, arguments)
        ranks = forked.call(_rank, *job, copies=world, environment=environment, timeout=timeout)
    for rank, ended in enumerate(ranks):
        assert not ended.failed, f"rank {rank} failed:\n{ended.result}\n{ended.output[-4000:]}"
    return [ended.result for ended in ranks]


def _rank(rank: int, store: str, world: int, function: Any, arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    minutes = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=minutes)
    result = function(*arguments)
    with contextlib.suppress(RuntimeError):  # another rank has failed, and says so itself
        dist.barrier()
        dist.destroy_process_group()
    return result
