"""Names by config path: converts a name or a dict per sub-config to one name per path, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axattn.errors import Reason, UnknownAttentionError
from axattn.spec import names


def resolve_names(value: names.AttentionNames, paths: tuple[str, ...]) -> dict[str, str | None]:
    """Name by config path from a name or a (nested) dict; a path without an entry keeps Transformers' default.

    Raises:
        UnknownAttentionError: a key is not a sub-config of this model.
    """
    if isinstance(value, str):
        return dict.fromkeys(paths, value)
    resolved: dict[str, str | None] = dict.fromkeys(paths, None)
    unknown: list[str] = []

    def fill(inner: Mapping[str, Any], prefix: str) -> None:
        for key, given in inner.items():
            path = prefix if key == "" else (f"{prefix}.{key}" if prefix else key)
            if path not in resolved:
                unknown.append(path)
            elif isinstance(given, Mapping):
                fill(given, path)
            else:
                below = [p for p in paths if p == path or (key != "" and p.startswith(f"{path}."))]
                resolved.update(dict.fromkeys(below, given))

    fill(value, "")
    if unknown:
        keys = ", ".join(repr(p) for p in paths)
        raise UnknownAttentionError(
            "attn_implementation names sub-configs that this model does not have",
            [Reason("name", f"unknown key {path!r}") for path in unknown],
            f"Its keys are {keys}.",
        )
    return resolved


def nested(by_path: Mapping[str, str | None]) -> dict[str, Any]:
    """``{"": a, "x": b, "x.y": c}`` in the nested form that Transformers accepts, without None values."""
    result: dict[str, Any] = {}
    for path, name in by_path.items():
        if name is None:
            continue
        *parents, last = path.split(".") if path else [""]
        inner = result
        for parent in parents:
            below = inner.setdefault(parent, {})
            if not isinstance(below, dict):
                below = inner[parent] = {"": below}
            inner = below
        inner[last] = name
    return result
