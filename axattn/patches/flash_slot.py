"""Transformers' process-wide slot for flash functions: filled before weights load, restored if that fails."""

from __future__ import annotations

import inspect
from typing import Any

from axattn.errors import AxattnError, BackendUnavailableError, Reason, UnsupportedAttentionError
from axattn.hf.model_internals import flash_slot
from axattn.planning.plan import Plan
from axattn.spec import names

_KEYWORDS = {
    # field of `Need` → the keywords in which Transformers passes it to a kernel
    "window": ("window_size",),
    "softcap": ("softcap",),
    "sinks": ("s_aux", "learnable_sink"),
    "dropout": ("dropout_p",),
}


def preload(plan: Plan, *, allow_all_kernels: bool = False) -> None:
    """Import the flash and hub kernels of a plan, as Transformers would while it makes the model.

    A failed import leaves Transformers' slot (5.17 to 5.23) with the name of the kernel that failed and the functions
    of the previous one, which the next attempt would run under the wrong name. Here the slot is restored.

    Args:
        plan: plan of a model.
        allow_all_kernels: allow hub kernels of any publisher.

    Raises:
        BackendUnavailableError: a kernel fails to import; its own error is the cause.
        UnsupportedAttentionError: a hub kernel lacks the parameter for a layer's need, which Transformers would drop.
    """
    seen = set()
    for path, name in plan.running.items():
        if name is not None and names.is_flash(name) and not name.startswith("paged|") and name not in seen:
            seen.add(name)
            _load(name, plan.loads.get(path), plan, allow_all_kernels)
    for source in dict.fromkeys(entry.chosen for entry in plan.layers if names.is_hub_sage(entry.chosen)):
        from axattn.backends import sage

        try:
            sage.load_hub(str(names.parse_hub_path(source)).removesuffix(":sageattn"), trust=allow_all_kernels)
        except Exception as error:  # as above: it runs third-party code
            raise _failed(source, source, error) from error


def _load(name: str, kernel: str | None, plan: Plan, allow_all_kernels: bool) -> None:
    """Load the kernel of a flash name into the slot.

    Args:
        name: as passed to Transformers.
        kernel: the hub kernel that runs, with its revision; None for a library.
        plan: plan of the model.
        allow_all_kernels: allow hub kernels of any publisher.
    """
    slot: Any = flash_slot()
    before = slot._loaded_implementation
    loads = name if kernel is None or "/" in name else kernel.split("@")[0]  # Transformers' own name for it
    try:
        slot.lazy_import_flash_attention(loads, allow_all_kernels=allow_all_kernels)
    except Exception as error:
        slot._loaded_implementation = before
        raise _failed(name, kernel or name, error) from error
    if kernel is None:
        return
    try:
        _require_functions(name, kernel, slot)
        _require_keywords(name, kernel, slot._flash_varlen_fn, plan)
    except AxattnError:
        slot._loaded_implementation = None  # it already holds this kernel's functions
        raise


def _failed(name: str, kernel: str, error: Exception) -> BackendUnavailableError:
    advice = 'Use attn_implementation="auto", which needs no other library.'
    message = f"{name} fails to load"
    if kernel != name:
        message = f"{name} fails to load: the hub kernel {kernel} replaces its library"
        advice = f"Install the library of {name}, or make the hub reachable. {advice}"
    return BackendUnavailableError(message, [Reason("library", f"{type(error).__name__}: {error}")], advice)


def _require_functions(name: str, kernel: str, slot: Any) -> None:
    """Raise if a kernel serves packed rows only: Transformers calls ``flash_attn_func`` for whole ones."""
    if slot._flash_varlen_fn is not None and slot._flash_fn is None:
        text = f"{kernel} has no flash_attn_func, which Transformers calls for rows without padding"
        raise BackendUnavailableError(
            f"{name} can't serve whole rows", [Reason("library", text)], 'Use attn_implementation="auto".'
        )


def _require_keywords(name: str, kernel: str, function: Any, plan: Plan) -> None:
    """Raise if the kernel's signature lacks the keyword of a layer's need, which Transformers would drop."""
    if function is None:
        return
    parameters = inspect.signature(function).parameters
    reasons = []
    for entry in plan.layers:
        if plan.running.get(entry.layer.path) != name:
            continue
        for feature, keywords in _KEYWORDS.items():
            if getattr(entry.layer.need, feature) and not any(keyword in parameters for keyword in keywords):
                text = f"{kernel} takes no {' or '.join(keywords)}, so Transformers would drop {feature} silently"
                reasons.append(Reason(feature, text))
    if reasons:
        raise UnsupportedAttentionError(
            f"{name} can't serve {plan.model}", list(dict.fromkeys(reasons)), 'Use attn_implementation="auto".'
        )
