"""Reads the settings of a training configuration from a YAML file; errors name the file and the line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from axattn.errors import InvalidConfigError, Reason
from axattn.tools.axolotl import setting_names, yaml_nodes

_COMMON = ("adapter", "model_type", "use_cache")  # similar to other programs' settings (`adapters`, `model_types`)


def settings(path: Path, known: Collection[str]) -> dict[Any, Any]:
    """The settings of a YAML file with one document, read by the safe loader.

    Args:
        path: of the file.
        known: the settings that axattn reads.

    Raises:
        InvalidConfigError: the file can't be read, or misspells one of `known`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfigError(f"{path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        reason = Reason("yaml", f"byte {error.start} is invalid")
        raise InvalidConfigError(f"{path.name} is not UTF-8 text", [reason], "Save it as UTF-8.") from error
    try:
        documents = yaml_nodes.compose(text).documents
        values = yaml_nodes.build(documents[0]) if documents else None
    except yaml_nodes.UnreadableYamlError as error:
        raise InvalidConfigError(f"{path.name} is not YAML that axattn can use", error.reasons) from error
    if len(documents) > 1:
        text = f"{path.name} holds {len(documents)} YAML documents (separated by ---)"
        raise InvalidConfigError(text, advice="Give a file with one document.")
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise InvalidConfigError(f"{path.name} is {kind}, not a mapping of settings")
    _refuse_misspelled(path, values, known)
    return values


def _refuse_misspelled(path: Path, values: dict[Any, Any], known: Collection[str]) -> None:
    """Raise for misspelled settings, which would be ignored silently."""
    targets = [name for name in known if name not in _COMMON]
    pairs = [(key, setting_names.misspelled_setting(key, targets)) for key in values if isinstance(key, str)]
    reasons = [Reason("name", f"{key} is not a setting; did you mean {wanted}?") for key, wanted in pairs if wanted]
    if reasons:
        raise InvalidConfigError(f"{path.name} can't be used", reasons)
