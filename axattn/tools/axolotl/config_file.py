"""Reads the settings of a training configuration from a YAML file: each fault is one error that names file and line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from axattn.errors import InvalidConfigError, Reason
from axattn.tools.axolotl import setting_names, yaml_nodes

_PLAIN = ("adapter", "model_type", "use_cache")  # words that settings of others resemble (`adapters`, `model_types`)


def settings(path: Path, ours: Collection[str]) -> dict[Any, Any]:
    """The settings of a YAML file of one document, read by the safe loader.

    Args:
        path: of the file.
        ours: the settings that axattn reads.

    Raises:
        InvalidConfigError: it can't be read, or misspells a setting of ours.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfigError(f"{path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        reason = Reason("yaml", f"byte {error.start} is none")
        raise InvalidConfigError(f"{path.name} is not UTF-8 text", [reason], "Save it as UTF-8.") from error
    try:
        documents = yaml_nodes.compose(text).documents
        values = yaml_nodes.build(documents[0]) if documents else None
    except yaml_nodes.UnreadableYamlError as error:
        raise InvalidConfigError(f"{path.name} is not YAML that can be used", error.reasons) from error
    if len(documents) > 1:
        text = f"{path.name} holds {len(documents)} YAML documents (a line --- starts each)"
        raise InvalidConfigError(text, advice="Give a file of one.")
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise InvalidConfigError(f"{path.name} is {kind}, not a mapping of settings")
    _refuse_misspelt(path, values, ours)
    return values


def _refuse_misspelt(path: Path, values: dict[Any, Any], ours: Collection[str]) -> None:
    """A setting of ours under a name that nobody reads would be lost in silence."""
    targets = [name for name in ours if name not in _PLAIN]
    pairs = [(key, setting_names.meant(key, targets)) for key in values if isinstance(key, str)]
    reasons = [Reason("name", f"{key} is no setting; did you mean {wanted}?") for key, wanted in pairs if wanted]
    if reasons:
        raise InvalidConfigError(f"{path.name} can't be used", reasons)
