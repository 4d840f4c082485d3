"""Gradients that are the same to the bit each time: who asks for them, and which kernels can't give them.

Asked for by a layer's keyword ``deterministic`` (ModernBERT's ``config.deterministic_flash_attn``) or
``FLASH_ATTENTION_DETERMINISTIC=1``, as Transformers has it, or by ``torch.use_deterministic_algorithms(True)``;
``transformers.enable_full_determinism`` sets the last two. FlashAttention takes it as an argument; torch's own kernels
follow ``torch.use_deterministic_algorithms`` alone. Forwards are deterministic on every kernel.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import torch

from axattn import backends, names
from axattn.backends.base import Backend
from axattn.capability import Capability, Need, missing
from axattn.environment import Environment
from axattn.errors import Reason, UnsupportedAttentionError

_VARIABLE = "FLASH_ATTENTION_DETERMINISTIC"
_ADVICE = 'Use attn_implementation="varlen", or torch.use_deterministic_algorithms(True, warn_only=True).'


def asked(told: object = None) -> bool:
    """Whether a deterministic gradient is asked for, and nothing else will do.

    Args:
        told: a layer's keyword ``deterministic``; None where it gives none.
    """
    if told is None:
        told = os.environ.get(_VARIABLE) == "1"
    return bool(told) or (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def wanted(told: object = None) -> bool:
    """`asked`, or to be given where there is one (``torch.use_deterministic_algorithms(True, warn_only=True)``)."""
    return torch.are_deterministic_algorithms_enabled() or asked(told)


def warn_if_lacking(backend: Backend, capability: Capability, need: Need) -> None:
    """Warn, as torch does with ``warn_only=True``, of a kernel that has no deterministic gradient."""
    if need.gradient and not need.deterministic and torch.are_deterministic_algorithms_enabled():
        lacking = missing(replace(need, deterministic=True), capability, backend.name)
        _warn(lacking)


def require_native(native: str, module: torch.nn.Module) -> None:
    """Raise, or warn, where Transformers would run a flash kernel whose gradient is not the one that is asked for: it
    reads the environment variable and not torch's setting (transformers 5.24).

    Args:
        native: a flash name.
        module: the model, in its forward.

    Raises:
        UnsupportedAttentionError: the model trains like this.
    """
    config: Any = module.config
    key = "deterministic_flash_attn"
    own = getattr(config.get_text_config(), key, None)
    told = own if own is not None else os.environ.get(_VARIABLE) == "1"
    if not (told or torch.are_deterministic_algorithms_enabled()) or not torch.is_grad_enabled():
        return
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    reasons = []
    if not told:
        fix = f"{_VARIABLE}=1" if own is None else f"config.{key}=True"
        text = "Transformers does not hand torch.use_deterministic_algorithms on to it"
        reasons.append(Reason("deterministic", text, fix))
    if native in names.FLASH:
        served = backends.get(native).capability_on(Environment.current())
        lacking = missing(Need(gradient=True, deterministic=True), served, native)
        reasons += [reason for reason in lacking if reason.feature == "deterministic"]
    if not reasons:
        return
    if asked(told):
        fixes = "".join(f"Set {reason.fix}. " for reason in reasons if reason.fix)
        text = f"{native} can't serve {type(module).__name__} in training"
        raise UnsupportedAttentionError(text, reasons, fixes + _ADVICE)
    _warn(reasons)


def _warn(reasons: list[Reason]) -> None:
    for reason in reasons:
        if reason.feature == "deterministic":  # once for each text: Python's own filter
            warnings.warn(f"axattn: {reason.text}", UserWarning, stacklevel=2)
