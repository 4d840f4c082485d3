"""What axattn asks of the ``kernels`` package and of the hub: who is trusted, what has been loaded."""

from __future__ import annotations

from typing import Any

from axattn.machine import hub_cache


def is_trusted(publisher: str) -> bool:
    """Whether the hub marks a publisher as one whose kernels ``kernels`` runs without a word; False where it can't be
    asked."""
    if hub_cache.is_offline():
        return False
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi().get_organization_overview(publisher)
    except Exception:  # no such publisher, no network: each huggingface_hub raises what its own HTTP library does
        return False
    return bool(getattr(info, "trustedKernelPublisher", False))


def loaded_revision(repository: str) -> str:
    """The commit of a kernel that this process has loaded from the hub, ``""`` where ``kernels`` does not tell."""
    try:
        from kernels import get_loaded_kernels
    except ImportError:
        return ""
    of = [loaded.repo_info for loaded in get_loaded_kernels() if loaded.repo_info is not None]
    return next((str(info.revision) for info in reversed(of) if info.repo_id == repository), "")


def build_of(function: Any) -> str:
    """The name of the build that a function of a hub kernel comes from: ``_flash_attn2_cuda_4eec01c``."""
    return str(getattr(function, "__module__", "") or "").split(".", maxsplit=1)[0]


def get(repository: str, revision: str, *, trust: bool) -> Any:
    """The module of a hub kernel.

    Args:
        repository: ``org/name``.
        revision: branch, tag or commit.
        trust: run it whoever publishes it.
    """
    from kernels import get_kernel

    return get_kernel(repository, revision=revision, trust_remote_code=trust)
