"""Two pretended GPUs: `load` before torch is imported, then `two_gpus`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WHY_NOT = ""
"""Why `load` could not, in words."""
_library: Any = None


def load() -> None:
    """Compile `device.cpp` against torch's headers, which takes seconds, and load it.

    Raises:
        RuntimeError: torch is imported already: it asks for its CUDA hooks once.
        subprocess.CalledProcessError: it does not compile; the compiler's message is on stderr.
    """
    global WHY_NOT, _library
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported: too late to pretend devices")
    compiler, spec = shutil.which("c++"), importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    torch = Path(spec.submodule_search_locations[0])
    if compiler is None or sys.platform != "linux":
        WHY_NOT = "GPUs are pretended on Linux, with a C++ compiler (c++)"
        return
    if not {"libtorch_cuda.so", "libtorch_hip.so"}.isdisjoint(path.name for path in (torch / "lib").iterdir()):
        WHY_NOT = "GPUs are pretended with torch's CPU build alone"
        return
    with tempfile.TemporaryDirectory(prefix="pretend-") as folder:
        library = Path(folder) / "device.so"
        include, libraries = [f"-I{torch / 'include'}"], [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
        command = [compiler, "-std=c++20", "-shared", "-fPIC", "-O1", str(Path(__file__).with_name("device.cpp"))]
        command += [*include, *libraries, "-lc10", "-ltorch_cpu", "-o", str(library)]
        subprocess.run(command, check=True)
        _library = ctypes.CDLL(str(library))
    _library.install()


def loaded() -> bool:
    """Whether this process has the devices."""
    return _library is not None


@contextlib.contextmanager
def two_gpus() -> Iterator[None]:
    """In this block ``cuda:0`` and ``cuda:1`` take tensors, a pair of Hopper GPUs by name."""
    import pytest
    import torch

    from tests.fakes.torch_flash import FLASH_OPS
    from tests.pretend.tensors import modes

    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 2,
        "current_device": _library.current_device,
        "current_stream": lambda device=None: None,
        "set_device": lambda device: _library.exchange_device(torch.cuda._get_device_index(device)),
        "_exchange_device": _library.exchange_device,
        "_maybe_exchange_device": _library.exchange_device,
        "stream": _Nothing,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "Pretended H100",
        "is_bf16_supported": lambda *given, **options: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    kernels = torch.library.Library("aten", "IMPL")
    for operator, stand_in in FLASH_OPS.items():
        kernels.impl(operator, stand_in, "CPU")
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, modes():
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        torch.__future__.set_swap_module_params_on_conversion(True)  # `Module.to` then exchanges what a parameter is
        try:
            yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
            kernels._destroy()


class _Nothing(contextlib.nullcontext[None]):
    def __init__(self, *_: Any) -> None:
        super().__init__()
