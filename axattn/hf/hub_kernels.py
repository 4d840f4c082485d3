"""Queries to the ``kernels`` package and the hub: trusted publishers, loaded kernels."""

from __future__ import annotations

from typing import Any

from axattn.machine import hub_cache


def is_trusted(publisher: str) -> bool:
    """Whether the hub marks a publisher as trusted, so that ``kernels`` runs its code without ``trust_remote_code``;
    False if the hub can't be reached."""
    if hub_cache.is_offline():
        return False
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi().get_organization_overview(publisher)
    except Exception:  # no such publisher, no network: the error depends on huggingface_hub's HTTP library
        return False
    return bool(getattr(info, "trustedKernelPublisher", False))


def loaded_revision(repository: str) -> str:
    """The commit of a kernel that this process has loaded from the hub, ``""`` if unknown to ``kernels``."""
    try:
        from kernels import get_loaded_kernels
    except ImportError:
        return ""
    infos = [loaded.repo_info for loaded in get_loaded_kernels() if loaded.repo_info is not None]
    return next((str(info.revision) for info in reversed(infos) if info.repo_id == repository), "")


def build_of(function: Any) -> str:
    """The build name of a hub kernel's function: ``_flash_attn2_cuda_4eec01c``."""
    return str(getattr(function, "__module__", "") or "").split(".", maxsplit=1)[0]


def get(repository: str, revision: str, *, trust: bool) -> Any:
    """The module of a hub kernel.

    Args:
        repository: ``org/name``.
        revision: branch, tag or commit.
        trust: run code of any publisher.
    """
    from kernels import get_kernel

    return get_kernel(repository, revision=revision, trust_remote_code=trust)
