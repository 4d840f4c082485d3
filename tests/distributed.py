"""Several processes on one machine with gloo: `run` starts them, gives each a rank and brings back what they return."""

from __future__ import annotations

import datetime
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def run(world: int, function: Any, *arguments: Any, timeout: float = 420) -> list[Any]:
    """Call a module-level function in `world` fresh processes that share a gloo group; what each returned, by rank.

    Raises:
        AssertionError: a process failed; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed", folder],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=_ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        outputs = []
        try:
            outputs = [worker.communicate(timeout=timeout)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        results = []
        for rank, text in enumerate(outputs):
            path = Path(folder) / str(rank)
            assert path.exists(), f"rank {rank} died:\n{text[-4000:]}"
            good, result = pickle.loads(path.read_bytes())
            assert good, f"rank {rank} failed:\n{result}\n{text[-2000:]}"
            results.append(result)
        return results


def _work(folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), world)
    module, name, arguments = pickle.loads((folder / "call").read_bytes())
    function = getattr(import_module(module), name)
    minute = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=minute)
    try:
        answer: tuple[bool, Any] = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    (folder / f"{rank}.part").write_bytes(pickle.dumps(answer))
    (folder / f"{rank}.part").rename(folder / str(rank))
    if answer[0]:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # a failed rank must not wait for the others


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
