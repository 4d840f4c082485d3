"""Hub kernels ``org/name[@rev][:fn]``: Transformers runs flash kernels, axattn runs sage kernels.

If the library of ``flash_attention_2/3/4`` is missing, Transformers runs a hub kernel instead
(`axattn.hf.flash_stand_ins`). What each kernel serves is in `axattn.backends.hub_records`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from packaging.specifiers import SpecifierSet

from axattn.backends.base import Backend, check_library
from axattn.backends.hub_records import FLASH, UNKNOWN, Broken, HubKernel
from axattn.backends.sage import hub_sage
from axattn.errors import Reason
from axattn.hf.flash_stand_ins import kernels_window, pinned
from axattn.machine.environment import Environment
from axattn.spec.capability import Capability
from axattn.spec.names import HUB_SAGE_REPOSITORIES, HubPath, parse_hub_path

DOWNLOAD_TIME = "downloads for some minutes, compiles nothing"


# ---- what it serves and needs ----------------------------------------------------------------------------------------


def hub_backend(path: HubPath) -> Backend:
    """A backend record for one hub path."""
    if path.repository in HUB_SAGE_REPOSITORIES:
        return hub_sage(path)
    known = FLASH.get(path.repository)
    first = UNKNOWN if known is None else next(iter(known.serves.values()))
    summary = "hub kernel of unknown kind" if known is None else f"hub kernel: {known.summary}"

    def probe(environment: Environment) -> list[Reason]:
        return _probe(path, known, environment)

    def on(environment: Environment) -> Capability:
        return UNKNOWN if known is None else _serves(pinned(path, environment), known, environment)

    return Backend(str(path), f"{summary}, run by Transformers", first, probe, install="pip install kernels", on=on)


def _serves(path: HubPath, known: HubKernel, environment: Environment) -> Capability:
    found = known.serves.get(environment.device, next(iter(known.serves.values())))
    if environment.sm is not None:
        found = dataclasses.replace(found, **known.narrower.get(environment.sm // 10, {}))
    lacking: dict[str, Any] = dict.fromkeys(known.lacks.get(path.revision or "", ()), False)
    found = dataclasses.replace(found, **lacking)
    bad = tuple(broken.refused for broken in broken_at(path))
    return dataclasses.replace(found, refuses=(*found.refuses, *bad)) if bad else found


def broken_at(path: HubPath) -> list[Broken]:
    """The known faults of a kernel at its revision."""
    known = FLASH.get(path.repository)
    revision = path.revision or ""
    return [
        broken
        for broken in (() if known is None else known.broken)
        if any(revision == bad or (len(bad) > 6 and revision.startswith(bad)) for bad in broken.revisions)
    ]


def without_fixed(capability: Capability, name: str, build: str, environment: Environment) -> Capability:
    """What a hub kernel serves once its build is known: a build with the fix is not refused.

    Args:
        capability: of the path.
        name: a hub path.
        build: the kernel's own name, such as ``_flash_attn2_cuda_4eec01c``.
        environment: the machine.
    """
    path = parse_hub_path(name)
    fixed = [
        broken.refused
        for broken in (() if path is None else broken_at(pinned(path, environment)))
        if build.endswith(broken.fixed)
    ]
    return dataclasses.replace(capability, refuses=tuple(one for one in capability.refuses if one not in fixed))


def _probe(path: HubPath, known: HubKernel | None, environment: Environment) -> list[Reason]:
    reasons: list[Reason] = []
    fix = f'pip install "kernels{kernels_window(environment)}" ({DOWNLOAD_TIME})'
    check_library(reasons, "kernels", "kernels", environment, fix, "0.16")
    if not reasons:
        reasons += _version_window(environment)
    if path.function is not None:
        text = f"Transformers refuses a function name ({path.function!r}) on attention kernels"
        reasons.append(Reason("name", text, str(HubPath(path.repository, path.revision))))
    if known is not None:
        if environment.device not in known.serves:
            devices = ", ".join(sorted(known.serves))
            text = f"{path.repository} has builds for {devices}; this machine has {environment.describe()}"
            reasons.append(Reason("gpu", text))
        elif environment.sm is not None and not known.runs_on(environment.sm):
            gpu = environment.gpu or "the GPU"
            reasons.append(Reason("gpu", f"{gpu} is sm{environment.sm}, {path.repository} runs on {known.shown_sms()}"))
        for key, shown in known.packages.items():
            check_library(reasons, key, shown, environment, f"pip install {shown}")
    return reasons + offline_reasons(path, environment)


def offline_reasons(path: HubPath, environment: Environment) -> list[Reason]:
    """Why a kernel can't be loaded offline: it is not in the cache."""
    here = pinned(path, environment)
    known = path.repository in FLASH or path.repository in HUB_SAGE_REPOSITORIES
    if not known or not environment.hub_offline or f"{here.repository}@*" in environment.hub_cached:
        return []
    if f"{here.repository}@{here.revision}" in environment.hub_cached:
        return []
    load = f"from kernels import get_kernel; get_kernel({here.repository!r}, revision={here.revision!r})"
    text = f"the hub is offline (HF_HUB_OFFLINE), and its cache has no {here}"
    return [Reason("hub", text, f'load it once online: python -c "{load}" ({DOWNLOAD_TIME})')]


def _version_window(environment: Environment) -> list[Reason]:
    transformers, kernels, window = (
        *map(environment.version, ("transformers", "kernels")),
        kernels_window(environment),
    )
    if not window or kernels is None or kernels in SpecifierSet(window, prereleases=True):
        return []
    text = f"transformers {transformers} needs kernels {window}, and {kernels} is installed"
    return [Reason("version", text, f'pip install "kernels{window}" ({DOWNLOAD_TIME})')]
