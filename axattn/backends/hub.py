"""Hub kernels ``org/name[@rev][:fn]``: Transformers runs flash kernels, axattn sage ones.

Where the library of ``flash_attention_2/3/4`` is absent Transformers runs a hub kernel in its place; `stand_in` says
which, and at which version. What each kernel serves is in `axattn.backends.hub_records`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from packaging.specifiers import SpecifierSet

from axattn.backends.base import Backend, check_library
from axattn.backends.hub_records import FLASH, UNKNOWN, Broken, HubKernel
from axattn.backends.sage import hub_sage
from axattn.capability import Capability
from axattn.environment import Environment
from axattn.errors import Reason
from axattn.names import HUB_SAGE_REPOSITORIES, HubPath, parse_hub_path

KERNELS_WINDOW: tuple[tuple[str, str], ...] = (
    # transformers from → the kernels versions it loads (KERNELS_MIN_VERSION, KERNELS_MAX_VERSION there)
    ("5.23", ">=0.18.2,<0.19"),
    ("5.20", ">=0.17.2,<0.18"),
    ("5.18", ">=0.17,<0.18"),
    ("5.17", ">=0.16,<0.17"),
)
MINUTES = "a download of minutes, nothing is compiled"


# ---- which kernel, at which version ----------------------------------------------------------------------------------


def stand_in(name: str, environment: Environment) -> HubPath | None:
    """The hub kernel that Transformers runs under a flash name, None where it runs the library itself or raises.

    Held by the contract "stand-ins from the hub" (`axattn.hf.transformers_contracts`).

    Args:
        name: any name.
        environment: the machine.
    """
    if environment.device not in ("cuda", "rocm", "xpu") or not environment.has("transformers", "5.17"):
        return None
    if name not in _LIBRARIES or _has_library(name, environment):
        return None
    repository = _STAND_INS[name]
    if environment.device == "rocm" and (name == "flash_attention_3" or environment.has("transformers", "5.20")):
        repository = _STAND_INS_ON_ROCM.get(name, repository)
    return HubPath(repository, version(repository, environment))


_LIBRARIES = {
    "flash_attention_2": ("flash_attn", "2.3.3"),
    "flash_attention_3": ("flash_attn_3", "0.0.1"),
    "flash_attention_4": ("flash_attn_4", None),
}
"""What Transformers looks for: key of ``Environment.libraries``, oldest version. A bare module without a distribution
(version 0) is none to it."""
_STAND_INS = {
    "flash_attention_2": "kernels-community/flash-attn2",
    "flash_attention_3": "kernels-community/vllm-flash-attn3",
    "flash_attention_4": "kernels-community/flash-attn4",
}
_STAND_INS_ON_ROCM = dict.fromkeys(("flash_attention_2", "flash_attention_3"), "kernels-community/aiter-flash-attn")


def _has_library(name: str, environment: Environment) -> bool:
    return environment.torch_device == "cuda" and environment.has(*_LIBRARIES[name])


def version(repository: str, environment: Environment) -> str:
    """The branch (``v4``) that Transformers loads of a repository that is named without a revision."""
    newer = environment.has("transformers", "5.18")
    if repository == "kernels-community/flash-attn2":
        four = environment.has("transformers", "5.22") and environment.has("torch", "2.10")
        return "v4" if four else "v3"
    if repository in ("kernels-community/aiter-flash-attn", "kernels-community/metal-flash-sdpa"):
        return "v2" if newer else "v1"
    return "v0" if repository == "kernels-community/flash-attn4" else "v1"


def pinned(path: HubPath, environment: Environment) -> HubPath:
    """A hub path with the revision that runs."""
    return path if path.revision else dataclasses.replace(path, revision=version(path.repository, environment))


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
    """What is known to be broken in a kernel at its revision."""
    known = FLASH.get(path.repository)
    revision = path.revision or ""
    return [
        broken
        for broken in (() if known is None else known.broken)
        if any(revision == bad or (len(bad) > 6 and revision.startswith(bad)) for bad in broken.revisions)
    ]


def without_mended(capability: Capability, name: str, build: str, environment: Environment) -> Capability:
    """What a hub kernel serves once its build is known: one that is known to be right is held for no bad one.

    Args:
        capability: of the path.
        name: a hub path.
        build: the kernel's own name, such as ``_flash_attn2_cuda_4eec01c``.
        environment: the machine.
    """
    path = parse_hub_path(name)
    mended = [
        broken.refused
        for broken in (() if path is None else broken_at(pinned(path, environment)))
        if build.endswith(broken.mended)
    ]
    return dataclasses.replace(capability, refuses=tuple(one for one in capability.refuses if one not in mended))


def _probe(path: HubPath, known: HubKernel | None, environment: Environment) -> list[Reason]:
    reasons: list[Reason] = []
    fix = f'pip install "kernels{kernels_window(environment)}" ({MINUTES})'
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
    """Why a kernel can't be had where the hub must not be asked."""
    here = pinned(path, environment)
    known = path.repository in FLASH or path.repository in HUB_SAGE_REPOSITORIES
    if not known or not environment.hub_offline or f"{here.repository}@*" in environment.hub_cached:
        return []
    if f"{here.repository}@{here.revision}" in environment.hub_cached:
        return []
    load = f"from kernels import get_kernel; get_kernel({here.repository!r}, revision={here.revision!r})"
    text = f"the hub is not to be asked (HF_HUB_OFFLINE), and its cache has no {here}"
    return [Reason("hub", text, f'load it once online: python -c "{load}" ({MINUTES})')]


def kernels_window(environment: Environment) -> str:
    """The versions of ``kernels`` that the machine's Transformers loads, ``""`` where that is not known."""
    transformers = environment.version("transformers")
    if transformers is None:
        return ""
    return next((window for start, window in KERNELS_WINDOW if environment.has("transformers", start)), "")


def _version_window(environment: Environment) -> list[Reason]:
    transformers, kernels, window = (
        *map(environment.version, ("transformers", "kernels")),
        kernels_window(environment),
    )
    if not window or kernels is None or kernels in SpecifierSet(window, prereleases=True):
        return []
    text = f"transformers {transformers} loads kernels {window}, and {kernels} is installed"
    return [Reason("version", text, f'pip install "kernels{window}" ({MINUTES})')]
