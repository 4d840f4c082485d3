"""Several processes on one machine with gloo: `run` gives each a rank and brings back what they return.

They are forked from one process that has imported what ranks need.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_IMPORTED = (
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict", "torch._dynamo"),
    *("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "transformers.generation.utils"),
    *("accelerate", "transformers.trainer", "tests.parallel_jobs", "tests.tensor_parallel_jobs"),
)
"""What ranks need."""


def run(world: int, function: Any, *arguments: Any, timeout: float = 420) -> list[Any]:
    """Call a module-level function in `world` fresh processes that share a gloo group; what each returned, by rank.

    Raises:
        AssertionError: a process failed; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = (function.__module__, function.__qualname__, arguments, {**os.environ, **_environment(world)})
        (Path(folder) / "call").write_bytes(pickle.dumps(call))
        _forked(folder, world, timeout)
        results = []
        for rank in range(world):
            path, log = (Path(folder) / f"{rank}{end}" for end in ("", ".log"))
            text = log.read_text(errors="replace") if log.exists() else ""
            assert path.exists(), f"rank {rank} died:\n{text[-4000:]}"
            good, result = pickle.loads(path.read_bytes())
            assert good, f"rank {rank} failed:\n{result}\n{text[-2000:]}"
            results.append(result)
        return results


def _environment(world: int) -> dict[str, str]:
    paths = {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return paths | quiet | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}


def _forked(folder: str, world: int, timeout: float) -> None:
    """Have the ranks forked, and wait for their end."""
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        parent.stdin.write(json.dumps([folder, world, timeout]) + "\n")
        parent.stdin.flush()
    if not parent.stdout.readline():
        _parent.cache_clear()
        raise AssertionError(f"the process that forks ranks ended: {parent.wait()}")


@functools.cache
def _parent() -> subprocess.Popen[str]:
    """The process that ranks are forked from: it lives as long as this one."""
    environment = {**os.environ, **_environment(1)}
    command = [sys.executable, "-m", "tests.distributed"]
    parent = subprocess.Popen(
        command, env=environment, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(_end, parent)
    return parent


def _end(parent: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        parent.communicate()  # closes its input


def _serve() -> None:
    """Fork the ranks of each line of the input, one line after the other."""
    import torch

    torch.set_num_threads(1)
    for name in _IMPORTED:
        with contextlib.suppress(ImportError):
            import_module(name)
    for line in sys.stdin:
        folder, world, timeout = json.loads(line)
        ranks = [_fork(Path(folder), rank, world) for rank in range(world)]
        _wait(ranks, time.monotonic() + timeout)
        print("ended", flush=True)


def _fork(folder: Path, rank: int, world: int) -> int:
    """Fork one rank; the process id. The rank does not return."""
    process = os.fork()
    if process == 0:
        _work(folder, rank, world)
    return process


def _wait(ranks: list[int], end: float) -> None:
    """Wait for processes, and end what runs for too long."""
    while ranks:
        for process in list(ranks):
            if os.waitpid(process, os.WNOHANG)[0]:
                ranks.remove(process)
            elif time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _work(folder: Path, rank: int, world: int) -> None:
    import torch.distributed as dist

    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        module, name, arguments, environment = pickle.loads((folder / "call").read_bytes())
        os.environ.clear()
        os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        store = dist.FileStore(str(folder / "store"), world)
        minute = datetime.timedelta(seconds=120)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=minute)
        answer: tuple[bool, Any] = (True, getattr(import_module(module), name)(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        (folder / f"{rank}.part").write_bytes(pickle.dumps(answer))
        (folder / f"{rank}.part").rename(folder / str(rank))
        if answer[0]:
            dist.barrier()
            dist.destroy_process_group()
    finally:
        os._exit(0)  # a failed rank must not wait for the others


if __name__ == "__main__":
    _serve()
