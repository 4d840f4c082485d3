"""The registry of kernel families: a file each, looked up by name and imported when first asked for.

Third parties add a backend through the entry point group ``axattn.backends``; one is loaded only when it is named.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from axattn.backends.base import Backend
from axattn.errors import BackendUnavailableError, Reason, UnknownAttentionError
from axattn.spec.names import ENTRY_POINT_GROUP, TABLE, Packs, flags, installed, parse_hub_path
from axattn.spec.names import packs as packs_by_name

_MODULES: dict[str, str] = {
    **{name: f"axattn.backends.{found.module}" for name, found in TABLE.items() if found.module},
    "sage:library": "axattn.backends.sage",
}


def builtin_names() -> tuple[str, ...]:
    """Names of the backends that ship with axattn."""
    return tuple(_MODULES)


@functools.cache
def get(name: str) -> Backend:
    """The backend of that name or hub path.

    Raises:
        UnknownAttentionError: no backend of that name, built in or installed.
        BackendUnavailableError: a third party's backend is installed and fails to import; its own error is the cause.
    """
    if name in _MODULES:
        module = importlib.import_module(_MODULES[name])
        found: Backend = next(backend for backend in module.BACKENDS if backend.name == name)
        return found
    path = parse_hub_path(name)
    if path is not None:
        from axattn.backends.hub import hub_backend

        return hub_backend(path)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            loaded = entry.load()
        except Exception as error:
            raise BackendUnavailableError(
                f"the installed backend {name!r} fails to import",
                [Reason("library", f"{type(error).__name__}: {error}")],
            ) from error
        if not isinstance(loaded, Backend) or loaded.name != name:
            raise BackendUnavailableError(f"the entry point {entry.value!r} is no axattn Backend named {name!r}")
        return loaded
    raise UnknownAttentionError(f"no backend named {name!r}", advice=f"Backends: {', '.join(_MODULES)}.")


def packs(name: str) -> Packs:
    """Whether the documents of a row stay apart on a name, and on what condition: ``"yes"``, ``"no"``, or
    ``"without a cache"`` (`axattn.spec.names.WITHOUT_A_CACHE`). What `axattn doctor`, the docs and `AttentionConfig`
    say."""
    if name in installed():
        return "yes" if get(name).capability.segments else "no"
    return packs_by_name(name.split(":", maxsplit=1)[0] if name in _MODULES else name)


def supports_packing(name: str) -> bool:
    """The flag ``attn_supports_packing`` of a name: axolotl's answer, which is no for ``eager`` and ``sdpa``."""
    if name in installed():
        return get(name).capability.segments
    return flags(name.split(":", maxsplit=1)[0] if name in _MODULES else name).packing
