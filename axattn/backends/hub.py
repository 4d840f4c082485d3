"""Hub kernels ``org/name[@rev][:fn]``, classified by repository: Transformers runs flash kernels, axattn sage ones."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from axattn.backends.base import HALVES, Backend, check_library
from axattn.backends.sage import hub_sage
from axattn.capability import Capability
from axattn.environment import Environment
from axattn.errors import Reason
from axattn.names import HUB_FLASH_REPOSITORIES, HUB_SAGE_REPOSITORIES, HubPath

_FLASH = Capability(
    devices=frozenset({"cuda", "cpu", "xpu"}),
    dtypes=HALVES | {"float32"},
    max_head_dim=256,
    grouped_heads=True,
    causal=True,
    bidirectional=True,
    window=True,
    padding=True,
    segments=True,
    cross_lengths=True,
    gradient=True,
    deterministic=True,
)

KERNELS_WINDOW: tuple[tuple[str, str], ...] = (
    # transformers from → the kernels versions it loads (measured)
    ("5.23", ">=0.18.2,<0.19"),
    ("5.20", ">=0.16,<0.18.2"),
    ("5.17", ">=0.16,<0.17"),
)


def hub_backend(path: HubPath) -> Backend:
    """A backend record for one hub path."""

    if path.repository in HUB_SAGE_REPOSITORIES:
        return hub_sage(path)

    def probe(environment: Environment) -> list[Reason]:
        reasons: list[Reason] = []
        check_library(reasons, "kernels", "kernels", environment, "pip install kernels", "0.16")
        if not reasons:
            reasons += _version_window(environment)
        if path.function is not None:
            text = f"Transformers refuses a function name ({path.function!r}) on attention kernels"
            reasons.append(Reason("name", text, str(HubPath(path.repository, path.revision))))
        return reasons

    known = path.repository in HUB_FLASH_REPOSITORIES
    summary = "hub flash kernel, run by Transformers" if known else "hub kernel of unknown kind, run by Transformers"
    return Backend(str(path), summary, _FLASH, probe, install="pip install kernels")


def _version_window(environment: Environment) -> list[Reason]:
    transformers, kernels = environment.version("transformers"), environment.version("kernels")
    if transformers is None or kernels is None:
        return []
    for start, window in KERNELS_WINDOW:
        if transformers in SpecifierSet(f">={start}"):
            if kernels in SpecifierSet(window):
                return []
            text = f"transformers {transformers} loads kernels {window}, and {kernels} is installed"
            return [Reason("version", text, f'pip install "kernels{window}"')]
    return []
