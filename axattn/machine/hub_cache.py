"""What this machine has of the hub: whether it may be asked, and which kernels are in its cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


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
