"""`Environment`: torch, CUDA or ROCm, GPU architecture, library versions. Probed once, frozen, injectable."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

_DISTRIBUTIONS: dict[str, str] = {
    # key → distribution on PyPI
    "torch": "torch",
    "transformers": "transformers",
    "flash_attn": "flash-attn",
    "flash_attn_3": "flash-attn-3",
    "fa3_fwd": "fa3-fwd",
    "flash_attn_4": "flash-attn-4",
    "xformers": "xformers",
    "sageattention": "sageattention",
    "torchao": "torchao",
    "kernels": "kernels",
    "triton": "triton",
    "nvidia_cutlass_dsl": "nvidia-cutlass-dsl",
    "quack_kernels": "quack-kernels",
    "cuda_runtime_12": "nvidia-cuda-runtime-cu12",
    "cuda_runtime_13": "nvidia-cuda-runtime",
}
_CUTE = "flash_attn/cute/__init__.py"  # flash-attn (FlashAttention 2) ships a file of that name too
_EXTRA_MODULES: dict[str, str] = {"flash_attn_3": "flash_attn_interface"}
"""Libraries that some builds ship as a bare module, without a distribution of the usual name."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The properties of a machine that decide which attention kernels run.

    Attributes:
        device: ``"cuda"``, ``"rocm"``, ``"npu"``, ``"xpu"``, ``"mps"`` or ``"cpu"``.
        architecture: (major, minor) compute capability of the first NVIDIA GPU, else None.
        gpu: the GPU's marketing name, else None.
        gpus: number of visible GPUs.
        cuda: CUDA version torch was built with, else None.
        rocm: ROCm version torch was built with, else None.
        python: Python version.
        libraries: version by key (``"torch"``, ``"transformers"``, ``"flash_attn"``, ...); absent when not installed.
        triton_interpret: ``TRITON_INTERPRET=1`` is set.
        flash_attn_4_shadowed: another package has overwritten ``flash_attn/cute`` of flash-attn-4.
        hub_offline: the hub must not be queried (``HF_HUB_OFFLINE``).
        hub_cached: the known hub kernels that are cached, as ``org/name@revision``; ``org/name@*`` for local folders.
        flash_attn_triton: flash-attn runs its Triton backend (``FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE``).
        gfx: architecture of the first AMD GPU (``"gfx942"``), else None.
        torch_flash: whether torch's flash kernels run on this AMD GPU; None elsewhere or when unknown.
        flash_impl: what replaces torch's flash kernels in this process (``"FA3"``, ``"FA4"``), else None.
    """

    device: str = "cpu"
    architecture: tuple[int, int] | None = None
    gpu: str | None = None
    gpus: int = 0
    cuda: str | None = None
    rocm: str | None = None
    python: str = field(default_factory=platform.python_version)
    libraries: Mapping[str, str] = field(default_factory=dict)
    triton_interpret: bool = False
    flash_attn_4_shadowed: bool = False
    hub_offline: bool = False
    hub_cached: frozenset[str] = frozenset()
    flash_attn_triton: bool = False
    gfx: str | None = None
    torch_flash: bool | None = None
    flash_impl: str | None = None

    def has(self, library: str, minimum: str | None = None) -> bool:
        """Whether `library` (a key of `libraries`) is installed, at `minimum` or newer. Local suffixes are ignored."""
        found = self.version(library)
        if found is None:
            return False
        return minimum is None or Version(found.base_version) >= Version(minimum)

    def version(self, library: str) -> Version | None:
        """The installed version of `library`, None when absent; an unreadable version counts as 0."""
        text = self.libraries.get(library)
        if text is None:
            return None
        try:
            return Version(text)
        except InvalidVersion:
            return Version("0")

    @property
    def torch_device(self) -> str:
        """The torch device type of this machine (``"cuda"`` on ROCm too)."""
        return "cuda" if self.device == "rocm" else self.device

    @property
    def sm(self) -> int | None:
        """The GPU architecture as one number (90 for Hopper), None without an NVIDIA GPU."""
        return None if self.architecture is None else self.architecture[0] * 10 + self.architecture[1]

    def describe(self) -> str:
        """A one-line summary."""
        if self.device == "cuda":
            return f"{self.gpu or 'NVIDIA GPU'} (sm{self.sm}, CUDA {self.cuda})"
        if self.device == "rocm":
            return f"{self.gpu or 'AMD GPU'} ({f'{self.gfx}, ' if self.gfx else ''}ROCm {self.rocm})"
        return {"cpu": "CPU, no GPU"}.get(self.device, self.device.upper())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, without paths or environment variables."""
        return {
            "device": self.device,
            "architecture": None if self.sm is None else f"sm{self.sm}",
            "gpu": self.gpu,
            "gpus": self.gpus,
            "cuda": self.cuda,
            "rocm": self.rocm,
            "python": self.python,
            "libraries": dict(self.libraries),
            "triton_interpret": self.triton_interpret,
            "flash_attn_4_shadowed": self.flash_attn_4_shadowed,
            "hub_offline": self.hub_offline,
            "hub_cached": sorted(self.hub_cached),
            "flash_attn_triton": self.flash_attn_triton,
            "gfx": self.gfx,
            "torch_flash": self.torch_flash,
            "flash_impl": self.flash_impl,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Environment:
        """Inverse of `to_dict`.

        Raises:
            KeyError: no ``device``.
            ValueError: an invalid ``architecture``.
        """
        text = value.get("architecture")
        architecture = None if text is None else divmod(int(str(text).removeprefix("sm")), 10)
        return cls(
            device=str(value["device"]),
            architecture=architecture,
            gpu=value.get("gpu"),
            gpus=int(value.get("gpus") or 0),
            cuda=value.get("cuda"),
            rocm=value.get("rocm"),
            python=str(value.get("python") or platform.python_version()),
            libraries=dict(value.get("libraries") or {}),
            triton_interpret=bool(value.get("triton_interpret")),
            flash_attn_4_shadowed=bool(value.get("flash_attn_4_shadowed")),
            hub_offline=bool(value.get("hub_offline")),
            hub_cached=frozenset(map(str, value.get("hub_cached") or ())),
            flash_attn_triton=bool(value.get("flash_attn_triton")),
            gfx=value.get("gfx"),
            torch_flash=value.get("torch_flash"),
            flash_impl=value.get("flash_impl"),
        )

    @classmethod
    def current(cls) -> Environment:
        """This machine, probed on the first call (`flash_impl`, which may change, on every call). Imports torch if it
        is installed, and no other library."""
        found = _probe()
        active = _flash_impl() if found.device == "cuda" else None
        return found if active is None else replace(found, flash_impl=active)


@functools.cache
def _probe() -> Environment:
    libraries = {key: version for key in _DISTRIBUTIONS if (version := _installed_version(key)) is not None}
    device, architecture, gpu, gpus, cuda, rocm, gfx, torch_flash = "cpu", None, None, 0, None, None, None, None
    if "torch" in libraries:
        import torch

        cuda, rocm = torch.version.cuda, torch.version.hip
        if torch.cuda.is_available():
            device, gpus = ("rocm" if rocm else "cuda"), torch.cuda.device_count()
            gpu = torch.cuda.get_device_name(0)
            architecture = None if rocm else torch.cuda.get_device_capability(0)
            if rocm:
                gfx, torch_flash = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0], _torch_flash()
        else:
            device = next((name for name in ("npu", "xpu", "mps") if _torch_device_available(name)), "cpu")
    return Environment(
        device=device,
        architecture=architecture,
        gpu=gpu,
        gpus=gpus,
        cuda=cuda,
        rocm=rocm,
        libraries=libraries,
        triton_interpret=os.environ.get("TRITON_INTERPRET") == "1",
        flash_attn_4_shadowed="flash_attn_4" in libraries and files_differ("flash-attn-4", _CUTE),
        flash_attn_triton=os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE") == "TRUE",  # flash-attn's exact spelling
        gfx=gfx,
        torch_flash=torch_flash,
        **_hub(libraries),
    )


def _torch_flash() -> bool | None:
    """Whether torch would run ``F.scaled_dot_product_attention`` on its flash kernel on this GPU; None if the user has
    switched that kernel off.

    AMD GPUs with experimental AOTriton support need ``TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1``.
    """
    import torch
    from torch.backends import cuda

    if not cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]  # untyped in torch
        return None
    x = torch.empty(1, 1, 16, 64, dtype=torch.float16, device="cuda")
    return bool(cuda.can_use_flash_attention(cuda.SDPAParams(x, x, x, None, 0.0, False, False)))


def _hub(libraries: Mapping[str, str]) -> dict[str, Any]:
    """The hub fields of `Environment`; empty without ``kernels``."""
    if "kernels" not in libraries:
        return {}
    from axattn.machine import hub_cache
    from axattn.spec.names import HUB_FLASH_REPOSITORIES, HUB_SAGE_REPOSITORIES

    cached = hub_cache.cached(HUB_FLASH_REPOSITORIES | HUB_SAGE_REPOSITORIES)
    return {"hub_offline": hub_cache.is_offline(), "hub_cached": cached}


def files_differ(distribution: str, name: str) -> bool:
    """Whether a file of an installed distribution differs from the hash in its RECORD."""
    for file in importlib.metadata.files(distribution) or ():
        if str(file) == name and file.hash is not None and (path := Path(str(file.locate()))).exists():
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
            return base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value
    return False


def _installed_version(key: str) -> str | None:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS[key])
    except importlib.metadata.PackageNotFoundError:
        module = _EXTRA_MODULES.get(key)
        return "0" if module is not None and importlib.util.find_spec(module) is not None else None


def _flash_impl() -> str | None:
    from torch.nn.attention import current_flash_attention_impl

    return current_flash_attention_impl()


def _torch_device_available(name: str) -> bool:
    import torch

    if name == "npu" and importlib.util.find_spec("torch_npu") is None:
        return False
    module = getattr(torch, name, None)
    return bool(module is not None and module.is_available())
