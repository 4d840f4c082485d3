"""Processes that start at once: forked from one that has imported torch, Transformers and axattn. No test lives here.

For tests that need a process of its own and not its imports. What imports do is tested in fresh interpreters.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_IMPORTED = (
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict", "torch._dynamo"),
    *("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "transformers.generation.utils"),
    *("accelerate", "peft", "transformers.trainer", "tests.parallel_jobs", "tests.tensor_parallel_jobs"),
)
"""Beside axattn."""


FORKED = pytest.mark.xdist_group("forked")
"""Of tests that call here: they share a worker, which imports once what its processes are forked with."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        result: what its function returned; the text of an error if it failed.
        failed: it raised, was ended or ended itself.
        stdout, stderr: what it wrote.
    """

    result: Any
    failed: bool
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """All that it wrote."""
        return self.stdout + self.stderr


def call(
    function: Callable[..., Any],
    *arguments: Any,
    copies: int = 1,
    environment: dict[str, str] | None = None,
    folder: Path = _ROOT,
    timeout: float = 420,
) -> list[Ended]:
    """Call a module-level function, each time with its number as the first argument, in processes side by side.

    Args:
        environment: on top of this process's.
        folder: where they run.
        timeout: seconds until they are ended.
    """
    with tempfile.TemporaryDirectory() as place:
        job = (function.__module__, function.__qualname__, arguments, os.environ | (environment or {}), str(folder))
        (Path(place) / "call").write_bytes(pickle.dumps(job))
        parent = _parent()
        assert parent.stdin is not None
        assert parent.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            parent.stdin.write(json.dumps([place, copies, timeout]) + "\n")
            parent.stdin.flush()
        if not parent.stdout.readline():
            _parent.cache_clear()
            raise AssertionError(f"the process that forks others ended: {parent.wait()}")
        return [_ended(Path(place), number) for number in range(copies)]


def _ended(place: Path, number: int) -> Ended:
    logs = [place / f"{number}.{name}" for name in ("stdout", "stderr")]
    written = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    answer = place / str(number)
    if not answer.exists():
        return Ended("it died", True, *written)
    good, result = pickle.loads(answer.read_bytes())
    return Ended(result, not good, *written)


def python(code: str, **options: Any) -> Ended:
    """Run code as ``python -c`` does."""
    return call(_code, code, **options)[0]


def script(path: Path, *arguments: str, **options: Any) -> Ended:
    """Run a file as ``python FILE ARGUMENTS`` does."""
    return call(_file, str(path), arguments, **options)[0]


def _code(number: int, code: str) -> None:
    sys.argv = ["-c"]
    with _ends():
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})  # the text of this project


def _file(number: int, path: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [path, *arguments]
    sys.path[:] = [str(Path(path).parent), *(one for one in sys.path if one not in ("", str(_ROOT)))]
    with _ends():
        runpy.run_path(path, run_name="__main__")


@contextlib.contextmanager
def _ends() -> Iterator[None]:
    """An end of the process, which is no failure where its code is 0."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise


@functools.cache
def _parent() -> subprocess.Popen[str]:
    """The process that others are forked from: it lives as long as this one."""
    paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.forked"]
    parent = subprocess.Popen(
        command, env=os.environ | own, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(_end, parent)
    return parent


def _end(parent: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        parent.communicate()  # closes its input


def _serve() -> None:
    """Fork the processes of each line of the input, one line after the other."""
    import torch

    import axattn  # noqa: F401

    torch.set_num_threads(1)
    for name in _IMPORTED:
        with contextlib.suppress(ImportError):
            import_module(name)
    gc.freeze()  # no process looks through what was imported
    gc.set_threshold(50_000, 20, 50)
    for line in sys.stdin:
        place, copies, timeout = json.loads(line)
        _wait([_fork(Path(place), number) for number in range(copies)], time.monotonic() + timeout)
        print("ended", flush=True)


def _fork(place: Path, number: int) -> int:
    """Fork one process; its id. The process does not return."""
    process = os.fork()
    if process == 0:
        _work(place, number)
    return process


def _wait(processes: list[int], end: float) -> None:
    """Wait for processes, and end those that run for too long."""
    while processes:
        for process in list(processes):
            if os.waitpid(process, os.WNOHANG)[0]:
                processes.remove(process)
            elif time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _work(place: Path, number: int) -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for at, log in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(place / f"{number}.{log}", os.O_WRONLY | os.O_CREAT), at)
        module, name, arguments, environment, folder = pickle.loads((place / "call").read_bytes())
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        answer: tuple[bool, Any] = (True, getattr(import_module(module), name)(number, *arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        (place / f"{number}.part").write_bytes(pickle.dumps(answer))
        (place / f"{number}.part").rename(place / str(number))
    finally:
        os._exit(0)  # nothing of the parent's is ended twice


if __name__ == "__main__":
    sys.modules["tests.forked"] = sys.modules["__main__"]
    _serve()
