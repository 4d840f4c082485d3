"""Model classes: which use Transformers' attention interface, and which names Transformers accepts for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.model_internals import SUPPORT, attention_classes, can_set_attention, compatible_flash, supports
from axattn.hf.source_inspection import calls_interface, used_in_forward
from axattn.planning.plan import Policy
from axattn.spec import names
from axattn.spec.sub_config_names import nested
from axattn.traits.layer_needs import sub_configs

_ADVICE = 'Use attn_implementation="eager" (or "sdpa"), or a dict that names only the sub-configs that can.'


def model_class_reasons(cls: type | None) -> list[Reason]:
    """Why a model class does not use Transformers' attention interface; empty if it does."""
    if cls is None:
        return []
    if can_set_attention(cls) and not _attends_itself(cls):
        return []
    return [Reason("model", f"{cls.__name__} does not use Transformers' attention interface")]


def _attends_itself(cls: Any) -> bool:
    """Whether a model class makes masks, and all its attention modules compute attention in their own code, in a file
    where others do not: Gemma 4's audio tower, which makes masks for eager attention."""
    if not any(name.startswith("create_") and name.endswith("_mask") for name in used_in_forward(cls)):
        return False
    modules: list[Any] = [one for one in attention_classes(cls) if inspect.isclass(one)]
    return bool(modules) and all(not calls_interface(one) and "softmax" in used_in_forward(one) for one in modules)


def native_support_reasons(cls: type | None, name: str) -> list[Reason]:
    """Why Transformers would raise for a model class on a native name, or run another kernel."""
    kind = "flash" if names.is_flash(name) else name.removeprefix("paged|")
    if cls is None or kind not in SUPPORT:
        return []
    if not supports(cls, kind):
        return [Reason("model", f"{cls.__name__} says that it does not support {name} ({SUPPORT[kind]} is False)")]
    listed = compatible_flash(cls)
    if names.is_flash(name) and listed and name not in listed:
        text = f"Transformers would run {cls.__name__} on {listed[0]} instead: it lists {', '.join(listed)}"
        return [Reason("model", text)]
    return []


def inner_model_classes(config: Any) -> dict[str, list[type]]:
    """The ``AutoModel`` classes of a config and its sub-configs, by path, for those that Transformers maps."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    classes: dict[str, list[type]] = {}
    for path, inner in sub_configs(config):
        if type(inner) in MODEL_MAPPING:
            found = MODEL_MAPPING[type(inner)]
            classes[path] = list(found) if isinstance(found, tuple) else [found]
    return classes


def _reasons_on_sdpa(cls: type | None) -> list[Reason]:
    """`model_class_reasons` for ``sdpa``, which older models implement in their own classes."""
    return model_class_reasons(cls) if cls is not None and _attends_itself(cls) else []


def require_interface(
    model: str,
    classes: Iterable[type | None],
    advice: str = _ADVICE,
    reasons_of: Callable[[type | None], list[Reason]] = model_class_reasons,
) -> None:
    """Raise unless every class uses Transformers' attention interface.

    Raises:
        UnsupportedAttentionError: with every class that does not.
    """
    reasons = list(dict.fromkeys(reason for cls in classes for reason in reasons_of(cls)))
    if reasons:
        raise UnsupportedAttentionError(f"{model} can't take another attention kernel", reasons, advice)


def around_towers(
    config: Any, cls: type | None, value: names.AttentionNames, policy: Policy
) -> tuple[names.AttentionNames, list[str]]:
    """The names asked for, with ``eager`` for inner models that compute attention in their own code, and notes on them.

    `auto` and ``on_unsupported="route"`` leave such a tower (Gemma 4's for audio) on ``eager``.

    Raises:
        UnsupportedAttentionError: the model itself computes attention in its own code, or an inner model does and the
            policy is ``"raise"``.
    """
    asked = set(names.names_in(value))
    if asked <= {"eager"}:
        return value, []
    reasons_of = _reasons_on_sdpa if asked <= {"eager", "sdpa"} else model_class_reasons
    model = cls.__name__ if cls is not None else config.model_type
    inner = inner_model_classes(config) if isinstance(value, str) else {}
    require_interface(model, [cls, *inner.pop("", ())], reasons_of=reasons_of)
    if not isinstance(value, str):  # the user has named each sub-config
        return value, []
    towers = {path: found for path, found in inner.items() if any(map(reasons_of, found))}
    if not towers:
        return value, []
    paths = [path for path, _ in sub_configs(config)]
    inside = {path for path in paths if any(f"{path}.".startswith(f"{tower}.") for tower in towers)}
    named = nested({path: "eager" if path in inside else value for path in paths})
    if value != "auto" and policy.on_unsupported == "raise":
        advice = f'Use attn_implementation={named}, or "auto".'
        require_interface(model, [one for found in towers.values() for one in found], advice, reasons_of)
    return named, [
        f"{path} runs on eager: {found[0].__name__} computes attention in its own code"
        for path, found in towers.items()
    ]
