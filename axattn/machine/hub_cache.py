"""The hub as this machine sees it: offline mode, and the kernels in its cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def is_offline() -> bool:
    """Whether the hub must not be queried (``HF_HUB_OFFLINE``, read once by huggingface_hub)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached(repositories: Iterable[str]) -> frozenset[str]:
    """The kernels that ``kernels`` finds without the hub: ``org/name@revision`` for branches and commits in its cache,
    ``org/name@*`` for a local folder (``LOCAL_KERNELS``).

    A kernel loaded by version is cached under its commit only: ``kernels`` (0.16 to 0.17) then finds it by the commit,
    not by the branch.
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
