"""Loads the config of a checkpoint, finds its model class, and reports errors of both before the weights load."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axattn.errors import InvalidConfigError, InvalidInputError, Reason

_HUB_KEYWORDS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
_NOT_FOR_CONFIG = ("dtype", "torch_dtype", "quantization_config", "device_map", "state_dict", "allow_all_kernels")


_GIVE = "Give the folder of a model, its config.json, or a hub name such as org/model."
_NONE: Mapping[str, Any] = {}
_SECONDS = 10.0
"""Timeout for asking the hub whether a model exists; Transformers would retry for half a minute."""


def load_config(source: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config as Transformers would load it, and the keywords that it did not use.

    Raises:
        InvalidInputError: `source` is not a folder, file or hub name, or does not exist.
        InvalidConfigError: its config.json can't be read, or Transformers rejects it.
    """
    from transformers import AutoConfig

    given = kwargs.pop("config", None)
    if given is not None and not isinstance(given, str | os.PathLike):
        if not hasattr(given, "sub_configs"):
            raise InvalidInputError(f"config is a {_kind(given)}, not a Transformers config or a path to one")
        return copy.deepcopy(given), kwargs
    source = given or source
    raw = require_source(source, kwargs)
    hub = {key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs}
    held = {key: kwargs.pop(key) for key in _NOT_FOR_CONFIG if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in hub}
    try:
        config, unused = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **hub, **rest)
    except OSError as error:
        raise InvalidInputError(f"{source} can't be loaded", [Reason("file", _one_line(error))]) from error
    except Exception as error:  # a config class may raise anything for values of the wrong type
        odd = [f"{key}={raw[key]!r} is not a whole number" for key in _WHOLE if not _is_whole_or_none(raw.get(key))]
        reasons = [Reason("config", text) for text in (*odd, f"{type(error).__name__}: {_one_line(error)}")]
        advice = "Correct its config.json." if os.path.exists(source) else ""
        raise InvalidConfigError(f"Transformers can't read the config of {source}", reasons, advice) from error
    return config, {**hub, **{k: v for k, v in unused.items() if k not in hub}, **held}


_WHOLE = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "num_hidden_layers", "vocab_size")


def _is_whole_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def require_source(source: Any, kwargs: Mapping[str, Any] = _NONE) -> Mapping[str, Any]:
    """Raise unless `source` has a config, or is a hub name that is cached or that the hub answers for.

    Args:
        source: the model that a user passed.
        kwargs: for ``from_pretrained``: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``gguf_file``, ...

    Returns:
        The contents of its config.json; empty for a name on the hub.

    Raises:
        InvalidInputError: it does not exist.
        InvalidConfigError: the file is not a config.
    """
    if not isinstance(source, str | os.PathLike) or isinstance(os.fspath(source), bytes):
        advice = 'For a loaded model: axattn.apply(model, "auto").' if hasattr(source, "parameters") else ""
        text = f"a model is loaded from a folder or a hub name, not from a {_kind(source)}"
        raise InvalidInputError(text, advice=advice or 'For example "./my-model" or "org/model".')
    if kwargs.get("gguf_file") is not None:
        return _NONE
    path = Path(source)
    try:
        path.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise InvalidInputError("no such folder", [Reason("file", _one_line(error))], _GIVE) from error
    if path.is_dir():
        return _config_in(path / (kwargs.get("subfolder") or ""), path)
    if path.is_file():
        return _config_of(path)
    _require_hub_name(os.fspath(source), kwargs)
    return _NONE


def load_weights(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    """``cls.from_pretrained(source, ...)``, with an `InvalidInputError` for missing or damaged files.

    Raises:
        InvalidInputError: there are no weights, or they can't be read.
    """
    from safetensors import SafetensorError

    if isinstance(source, str | os.PathLike) and os.path.isfile(source) and kwargs.get("gguf_file") is None:
        folder = os.path.dirname(source) or "."
        raise InvalidInputError(f"{source} is a file, not the folder of a model", advice=f"Give {folder!r}.")
    try:
        return cls.from_pretrained(source, *args, **kwargs)
    except (OSError, SafetensorError) as error:
        advice = "axattn.plan and `axattn verify` need only its config." if os.path.isdir(str(source)) else ""
        reason = Reason("weights", f"{type(error).__name__}: {_one_line(error)}")
        raise InvalidInputError(f"the weights of {source} can't be loaded", [reason], advice) from error


def _config_in(folder: Path, named: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if file.is_file():
        return _config_of(file)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = _mapping_in(adapter).get("base_model_name_or_path") or "its base model"
        advice = f'Load {base} through axattn, then the adapter: PeftModel.from_pretrained(model, "{named}").'
        raise InvalidInputError(f"{named} holds an adapter (adapter_config.json), not a model", advice=advice)
    advice = "Give the folder that model.save_pretrained wrote."
    inside = sorted(child.parent.name for child in folder.glob("*/config.json")) if folder.is_dir() else []
    if inside:
        advice = f"Its subfolders with one: {', '.join(inside[:8])}."
    raise InvalidInputError(f"{folder} has no config.json", advice=advice)


def _config_of(file: Path) -> dict[str, Any]:
    found = _mapping_in(file)
    kind = found.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise InvalidConfigError(f"{file}: model_type={kind!r} is not the name of a model type", advice=_GIVE)
    return found


def _mapping_in(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        InvalidInputError: the file can't be read.
        InvalidConfigError: it is not JSON, or not a mapping.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
        raise InvalidConfigError(f"{file} is not JSON", [Reason("json", _one_line(error))], _GIVE) from error
    except OSError as error:
        raise InvalidInputError(f"{file} can't be read", [Reason("file", _one_line(error))]) from error
    if not isinstance(found, dict):
        kind = "null" if found is None else f"a {type(found).__name__}"
        raise InvalidConfigError(f"{file} is {kind}, not a mapping of settings", advice=_GIVE)
    return found


def _require_hub_name(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise for a path that does not exist, and for a name that is not cached while the hub can't be reached."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    path = Path(name)
    parent = f" ({path.parent} exists)" if path.parent.is_dir() and len(path.parts) > 1 else ""
    nothing = f"no such folder: {name!r}{parent}"
    asked = {key: kwargs[key] for key in ("cache_dir", "revision") if kwargs.get(key) is not None}
    inside = f"{kwargs['subfolder']}/" if kwargs.get("subfolder") else ""
    is_path = not name or name.startswith((".", "~", os.sep)) or name.endswith((os.sep, ".json")) or "\\" in name
    try:
        cached = not is_path and isinstance(try_to_load_from_cache(name, f"{inside}config.json", **asked), str)
    except HFValidationError:
        is_path = True
    if is_path:
        raise InvalidInputError(nothing, advice=_GIVE)
    if cached or kwargs.get("local_files_only"):
        return
    try:
        HfApi().model_info(name, timeout=_SECONDS, token=kwargs.get("token"))
    except (HfHubHTTPError, OfflineModeIsEnabled):
        return  # Transformers reports the hub's answer, or offline mode
    except Exception as error:  # the HTTP client has many error types for a failed connection
        if "Timeout" in type(error).__name__:
            return  # slow, not down: Transformers retries
        reason = Reason("hub", f"the hub can't be reached ({_one_line(error)}), and its cache has no {name}")
        raise InvalidInputError(nothing, [reason], _GIVE) from error


def _kind(value: Any) -> str:
    return "class" if isinstance(value, type) else "None" if value is None else type(value).__name__


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."


def resolve_class(model_class: Any, config: Any) -> Any:
    """The given class, else the one in the checkpoint's ``architectures``, else ``AutoModelForCausalLM``.

    Raises:
        InvalidInputError: `model_class` is not a class that loads models.
        InvalidConfigError: ``architectures`` is not a list of names.
    """
    import transformers

    if model_class is not None:
        loads = isinstance(model_class, type) and callable(getattr(model_class, "from_pretrained", None))
        others = (transformers.PreTrainedConfig, transformers.AutoConfig, transformers.AutoTokenizer)
        if not loads or issubclass(model_class, others):
            shown = repr(model_class) if isinstance(model_class, str) else f"a {_kind(model_class)}"
            named = isinstance(model_class, str) and isinstance(getattr(transformers, model_class, None), type)
            name = model_class if named else "AutoModelForCausalLM"
            advice = f"Give the class itself: model_class=transformers.{name}."
            raise InvalidInputError(f"model_class is {shown}, not a model class", advice=advice)
        return model_class
    listed = getattr(config, "architectures", None) or ()
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
        text = f"architectures is {listed!r} in the config, not a list of class names"
        raise InvalidConfigError(text, advice="Correct the config, or pass model_class.")
    for name in listed:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.AutoModelForCausalLM


def concrete_class(cls: Any, config: Any) -> type | None:
    """The model class behind an Auto class, None when Transformers has no mapping for this config (remote code)."""
    mapping = getattr(cls, "_model_mapping", None)
    if mapping is None:
        return cls if isinstance(cls, type) else None
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    concrete: type = found[0] if isinstance(found, tuple) else found
    return concrete


def require_constructible(cls: Any, config: Any) -> None:
    """Raise if the model class rejects a config when built on ``meta``, which allocates no weights.

    Raises:
        InvalidConfigError: with the class's own message.
    """
    import torch

    tried = copy.deepcopy(config)
    tried._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            cls(tried)
    except (ValueError, AssertionError) as error:
        reason = Reason("config", _one_line(error))
        raise InvalidConfigError(f"{cls.__name__} can't be built from this config", [reason]) from error
