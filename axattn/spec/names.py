"""Names of attention implementations: canonical ones, refused short forms, hub paths, the legacy map. Pure strings."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from axattn.errors import Reason, UnknownAttentionError

NATIVE: tuple[str, ...] = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
"""Native names: Transformers serves them itself; axattn checks them and passes them through."""


@dataclass(frozen=True, slots=True)
class NameFlags:
    """What is known of a name before its backend is imported.

    Attributes:
        packing: `AttentionConfig.attn_supports_packing`; `packs` has the condition for packing.
        flash_lib: `AttentionConfig.attn_uses_flash_lib`.
        dtype_cast: `AttentionConfig.attn_needs_dtype_cast`.
        module: of its backend, in `axattn.backends`; ``""`` for ``auto``, which chooses among them.
    """

    packing: bool
    flash_lib: bool
    dtype_cast: bool
    module: str = field(default="", compare=False)


TABLE: dict[str, NameFlags] = {
    #                      packing, flash library, dtype cast, module
    "eager": NameFlags(False, False, False, "eager"),
    "sdpa": NameFlags(False, False, False, "sdpa"),
    "flash_attention_2": NameFlags(True, True, True, "flash"),
    "flash_attention_3": NameFlags(True, True, True, "flash"),
    "flash_attention_4": NameFlags(True, True, True, "flash"),
    "flex_attention": NameFlags(True, False, True, "flex"),
    "varlen": NameFlags(True, False, True, "varlen"),
    "xformers": NameFlags(True, False, True, "xformers"),
    "sage": NameFlags(True, False, True, "sage"),
    "s2": NameFlags(False, True, True, "s2"),
    "fp8": NameFlags(True, False, True, "fp8"),
    "auto": NameFlags(True, False, False),
}
"""Every name, native ones first. A new backend is a line here, its file, and its rank (`axattn.planning.ranking`)."""

AXATTN_BACKENDS: tuple[str, ...] = tuple(name for name in TABLE if name not in NATIVE)
"""Names that axattn registers with Transformers. ``auto`` chooses among exact kernels."""

CANONICAL: tuple[str, ...] = NATIVE + AXATTN_BACKENDS

ENTRY_POINT_GROUP = "axattn.backends"
_VALID_NAME = re.compile(r"^(?!.*(flash|sdpa|flex_attention))[a-z][a-z0-9_]*$")  # Transformers interprets these words


@functools.cache
def installed() -> tuple[str, ...]:
    """Names of installed third-party backends, read from package metadata without importing them."""
    entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return tuple(sorted({entry.name for entry in entries if _VALID_NAME.match(entry.name)} - set(CANONICAL)))


def axattn_backends() -> tuple[str, ...]:
    """Every name that axattn registers with Transformers: built-in and third-party backends."""
    return (*AXATTN_BACKENDS, *installed())


FLASH: tuple[str, ...] = ("flash_attention_2", "flash_attention_3", "flash_attention_4")

SHORT_FORMS: dict[str, str] = {
    "flash": "flash_attention_2",
    "fa": "flash_attention_2",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "fa4": "flash_attention_4",
    "flash2": "flash_attention_2",
    "flash3": "flash_attention_3",
    "flash4": "flash_attention_4",
    "flash_attn": "flash_attention_2",
    "flash_attn_2": "flash_attention_2",
    "flash_attn_3": "flash_attention_3",
    "flash_attn_4": "flash_attention_4",
    "flash_attn2": "flash_attention_2",
    "flash_attn3": "flash_attention_3",
    "flash_attn4": "flash_attention_4",
    "flash_attention": "flash_attention_2",
    "flash_attention2": "flash_attention_2",
    "flash_attention3": "flash_attention_3",
    "flash_attention4": "flash_attention_4",
    "sdp": "sdpa",
    "sdp_attention": "sdpa",
    "sdpa_attention": "sdpa",
    "torch_sdpa": "sdpa",
    "flex": "flex_attention",
    "flex_attn": "flex_attention",
    "xformer": "xformers",
    "xformers_attention": "xformers",
    "memory_efficient": "xformers",
    "sageattn": "sage",
    "sageattention": "sage",
    "sage_attn": "sage",
    "sage_attention": "sage",
    "s2_attn": "s2",
    "s2_attention": "s2",
    "shifted_sparse_attention": "s2",
    "fp8_attention": "fp8",
    "float8": "fp8",
    "eager_attention": "eager",
    "math": "eager",
    "var_len": "varlen",
    "varlen_attn": "varlen",
    "varlen_attention": "varlen",
    "automatic": "auto",
}
"""Refused short forms, and the canonical name that the error message suggests."""

AXOLOTL_ONLY: frozenset[str] = frozenset({"flash_attention_torch"})
"""Names that axolotl accepts and axattn does not: no similar name is suggested for them."""

LEGACY_FLAGS: dict[str, str] = {
    "s2_attention": "s2",
    "sage_attention": "sage",
    "xformers_attention": "xformers",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
"""Legacy boolean → canonical name, in order of priority when several are set."""

HUB_FLASH_REPOSITORIES: frozenset[str] = frozenset(
    f"kernels-community/{name}"
    for name in (
        "flash-attn2",
        "flash-attn3",
        "vllm-flash-attn3",
        "flash-attn4",
        "aiter-flash-attn",
        "metal-flash-sdpa",
    )
)
HUB_SAGE_REPOSITORIES: frozenset[str] = frozenset(
    {"kernels-community/sage-attention", "SageAttention/sage-attention", "kernels-community/sage-blackwell"}
)
TRUSTED_PUBLISHERS: frozenset[str] = frozenset({"kernels-community"})
"""Hub publishers that are always trusted; for others the hub is queried (`axattn.hf.hub_kernels`)."""

_HUB_PATH = re.compile(
    r"^(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^:@\s]+))?(?::(?P<function>[A-Za-z_]\w*))?$"
)

AttentionNames = str | dict[str, Any]
"""One canonical name, or a dict per sub-config: ``{"": name, "text_config": name or dict}``."""


@dataclass(frozen=True, slots=True)
class HubPath:
    """A hub kernel ``org/name[@revision][:function]``."""

    repository: str
    revision: str | None = None
    function: str | None = None

    def __str__(self) -> str:
        text = self.repository
        text += f"@{self.revision}" if self.revision else ""
        return text + (f":{self.function}" if self.function else "")


Packs = Literal["yes", "without a cache", "no"]
WITHOUT_A_CACHE = (
    "rows described by position_ids, with use_cache=False and no attention_mask, in models that pass position_ids to "
    "Transformers' masks; axattn refuses other packed rows there"
)
"""When a name whose masks Transformers makes keeps documents apart."""


_HUB_FLASH_FLAGS = NameFlags(True, True, True)
_HUB_SAGE_FLAGS = NameFlags(True, False, True)
_HUB_UNKNOWN_FLAGS = NameFlags(False, False, True)
_INSTALLED_FLAGS = NameFlags(False, False, True)  # its `Capability` says whether it packs: see `axattn.backends.packs`


def parse_hub_path(name: str) -> HubPath | None:
    """``org/name[@revision][:function]`` as a `HubPath`, or None when `name` has no slash.

    Raises:
        UnknownAttentionError: `name` has a slash but is not a valid hub path.
    """
    if "/" not in name:
        return None
    match = _HUB_PATH.match(name)
    if match is None:
        raise UnknownAttentionError(
            f"{name!r} is not a hub kernel path",
            [Reason("name", "write a hub kernel as org/name, org/name@revision or org/name@revision:function")],
            'For example "kernels-community/flash-attn2@v0.1.0".',
        )
    return HubPath(match["repository"], match["revision"], match["function"])


def is_known_hub_repository(name: str) -> bool:
    """Whether `name` is a hub path of a repository that axattn knows, with any revision and function."""
    path = parse_hub_path(name)
    return path is not None and path.repository in HUB_FLASH_REPOSITORIES | HUB_SAGE_REPOSITORIES


def is_native(name: str) -> bool:
    """Whether Transformers serves `name` itself (``paged|`` names and hub paths included, except sage kernels)."""
    return name in NATIVE or name.startswith("paged|") or ("/" in name and not is_hub_sage(name))


def is_hub_sage(name: str) -> bool:
    """Whether `name` is the hub path of a sage kernel, which axattn calls itself."""
    path = parse_hub_path(name)
    return path is not None and path.repository in HUB_SAGE_REPOSITORIES


def is_flash(name: str) -> bool:
    """Whether Transformers serves `name` through its flash attention path (hub flash kernels included)."""
    path = parse_hub_path(name)
    return name in FLASH or (path is not None and path.repository not in HUB_SAGE_REPOSITORIES)


def flags(name: str) -> NameFlags:
    """The capability flags of a canonical name or hub path, looked up by name."""
    bare = name.removeprefix("paged|")
    path = parse_hub_path(bare)
    if path is None:
        return _INSTALLED_FLAGS if bare in installed() else TABLE[bare]
    if path.repository in HUB_FLASH_REPOSITORIES:
        return _HUB_FLASH_FLAGS
    return _HUB_SAGE_FLAGS if path.repository in HUB_SAGE_REPOSITORIES else _HUB_UNKNOWN_FLAGS


def packs(name: str) -> Packs:
    """Whether a canonical name or hub path keeps the documents of a row apart, and under which condition."""
    if name.removeprefix("paged|") in ("eager", "sdpa", "flex_attention"):
        return "without a cache"
    return "yes" if flags(name).packing else "no"


def canonicalise(name: str) -> str:
    """Return `name` if it is canonical or a hub path; refuse everything else and suggest the right name.

    ``paged|name`` is accepted if ``name`` is; the load checks whether the installed Transformers supports it.

    Raises:
        UnknownAttentionError: short form, misspelling, unknown name, or not a string.
    """
    if not isinstance(name, str):
        raise UnknownAttentionError(
            f"attn_implementation must be a name or a dict of names, not {type(name).__name__}",
            advice=f"Names: {', '.join(CANONICAL)}.",
        )
    if name in CANONICAL or name in installed():
        return name
    if name.startswith("paged|"):
        inner = canonicalise(name.removeprefix("paged|"))
        if inner in axattn_backends():
            raise UnknownAttentionError(
                f"{name!r} can't be used", [Reason("paged", f"the axattn backend {inner!r} has no paged cache")]
            )
        return name
    if parse_hub_path(name) is not None:
        return name
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    canonical = SHORT_FORMS.get(key, key if key in CANONICAL else None)
    if canonical is not None:
        raise UnknownAttentionError(
            f"attn_implementation={name!r} is not accepted", advice=f'Write attn_implementation="{canonical}".'
        )
    near = difflib.get_close_matches(key, [*CANONICAL, *SHORT_FORMS], n=1, cutoff=0.6)
    close = [] if key in AXOLOTL_ONLY else near
    advice = f"Names: {', '.join((*CANONICAL, *installed()))}, or a hub kernel path org/name."
    if close:
        advice = f'Did you mean "{SHORT_FORMS.get(close[0], close[0])}"? ' + advice
    raise UnknownAttentionError(f"attn_implementation={name!r} is unknown", advice=advice)


def canonicalise_all(value: str | Mapping[str, Any]) -> AttentionNames:
    """`canonicalise` for a name or a (nested) dict per sub-config; every bad entry is reported at once.

    Raises:
        UnknownAttentionError: a value is not a name, or a dict is empty.
    """
    if not isinstance(value, Mapping):
        return canonicalise(value)
    reasons: list[Reason] = []
    result = _canonicalise_mapping(value, "", reasons)
    if reasons:
        raise UnknownAttentionError("attn_implementation can't be used", reasons)
    return result


def _canonicalise_mapping(value: Mapping[str, Any], path: str, reasons: list[Reason]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if not value:
        reasons.append(Reason("name", f"the dict {path or 'given'} is empty"))
    for key, inner in value.items():
        where = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str):
            reasons.append(Reason("name", f"key {key!r} is not a string"))
        elif isinstance(inner, Mapping) and key:
            result[key] = _canonicalise_mapping(inner, where, reasons)
        else:
            try:
                result[key] = canonicalise(inner)
            except UnknownAttentionError as error:
                reasons.append(Reason("name", f"[{where!r}] {error}"))
    return result


def names_in(value: AttentionNames) -> list[str]:
    """The unique names in a name or a nested dict of names, in order."""
    if isinstance(value, str):
        return [value]
    found: list[str] = []
    for inner in value.values():
        found += [name for name in names_in(inner) if name not in found]
    return found
