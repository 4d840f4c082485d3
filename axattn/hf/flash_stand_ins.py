"""The hub kernel that Transformers runs if a flash library is missing, its version, and the ``kernels`` versions.

Checked by the contract "stand-ins from the hub" (`axattn.hf.transformers_contracts`). What each kernel serves is in
`axattn.backends.hub_records`.
"""

from __future__ import annotations

import dataclasses

from axattn.machine.environment import Environment
from axattn.spec.names import HubPath

KERNELS_WINDOW: tuple[tuple[str, str], ...] = (
    # transformers from → the kernels versions it accepts (its KERNELS_MIN_VERSION, KERNELS_MAX_VERSION)
    ("5.23", ">=0.18.2,<0.19"),
    ("5.20", ">=0.17.2,<0.18"),
    ("5.18", ">=0.17,<0.18"),
    ("5.17", ">=0.16,<0.17"),
)


def stand_in(name: str, environment: Environment) -> HubPath | None:
    """The hub kernel that Transformers runs under a flash name, None if it runs the library itself or raises.

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
"""What Transformers looks for: key of ``Environment.libraries``, oldest version. It ignores a bare module without a
distribution (version 0)."""
_STAND_INS = {
    "flash_attention_2": "kernels-community/flash-attn2",
    "flash_attention_3": "kernels-community/vllm-flash-attn3",
    "flash_attention_4": "kernels-community/flash-attn4",
}
_STAND_INS_ON_ROCM = dict.fromkeys(("flash_attention_2", "flash_attention_3"), "kernels-community/aiter-flash-attn")


def _has_library(name: str, environment: Environment) -> bool:
    return environment.torch_device == "cuda" and environment.has(*_LIBRARIES[name])


def version(repository: str, environment: Environment) -> str:
    """The branch (``v4``) that Transformers loads from a repository named without a revision."""
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


def kernels_window(environment: Environment) -> str:
    """The versions of ``kernels`` that the machine's Transformers accepts, ``""`` if unknown."""
    transformers = environment.version("transformers")
    if transformers is None:
        return ""
    return next((window for start, window in KERNELS_WINDOW if environment.has("transformers", start)), "")
