"""What a checkpoint is, before its weights: its config, and the model class that it names."""

from __future__ import annotations

import copy
from typing import Any

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


def load_config(source: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config as Transformers' own loading would make it, and the keywords that it left over."""
    from transformers import AutoConfig

    given = kwargs.pop("config", None)
    if given is not None and not isinstance(given, str):
        return copy.deepcopy(given), kwargs
    hub = {key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs}
    held = {key: kwargs.pop(key) for key in _NOT_FOR_CONFIG if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in hub}
    config, unused = AutoConfig.from_pretrained(given or source, return_unused_kwargs=True, **hub, **rest)
    return config, {**hub, **{k: v for k, v in unused.items() if k not in hub}, **held}


def resolve_class(model_class: Any, config: Any) -> Any:
    """The class given, else the one that the checkpoint names in ``architectures``, else ``AutoModelForCausalLM``."""
    import transformers

    if model_class is not None:
        return model_class
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
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
