"""What axattn asks of the ``kernels`` package and of the hub: what is cached, who is trusted, what has been loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def is_offline() -> bool:
    """Whether the hub is not to be asked (``HF_HUB_OFFLINE``, read once by huggingface_hub)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached(repositories: Iterable[str]) -> frozenset[str]:
    """``org/name@revision`` of what ``kernels`` finds without the hub: branches and commits in its cache, and
    ``org/name@*`` for a folder of the user's own (``LOCAL_KERNELS``).

    A kernel that was loaded by its version is cached under its commit alone: ``kernels`` (0.16 to 0.17) then knows the
    branch no more, and finds it by the commit only.
    """
    from huggingface_hub import constants

    root = Path(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE)
    local = {entry.split("=", 1)[0] for entry in os.environ.get("LOCAL_KERNELS", "").split(":") if "=" in entry}
    found = set()
    for repository in repositories:
        folder = root / f"kernels--{repository.replace('/', '--')}"
        for inside in ("refs", "snapshots"):
            if (folder / inside).is_dir():
                found |= {f"{repository}@{entry.name}" for entry in (folder / inside).iterdir()}
        found |= {f"{repository}@*"} & {f"{name}@*" for name in local}
    return frozenset(found)


def is_trusted(publisher: str) -> bool:
    """Whether the hub marks a publisher as one whose kernels ``kernels`` runs without a word; False where it can't be
    asked."""
    if is_offline():
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
