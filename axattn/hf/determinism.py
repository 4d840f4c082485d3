"""Whether bitwise reproducible gradients are requested.

They are requested by a layer's keyword ``deterministic`` (ModernBERT's ``config.deterministic_flash_attn``) or
``FLASH_ATTENTION_DETERMINISTIC=1``, as in Transformers, or by ``torch.use_deterministic_algorithms(True)``;
``transformers.enable_full_determinism`` sets the last two. FlashAttention takes an argument for it; torch's kernels
follow ``torch.use_deterministic_algorithms`` only. Forwards are deterministic on every kernel.
"""

from __future__ import annotations

import os
from typing import Any

import torch

DETERMINISTIC_VARIABLE = "FLASH_ATTENTION_DETERMINISTIC"


def required(given: object = None) -> bool:
    """Whether a deterministic gradient is required.

    Args:
        given: a layer's keyword ``deterministic``, None if absent.
    """
    if given is None:
        given = os.environ.get(DETERMINISTIC_VARIABLE) == "1"
    return bool(given) or (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def preferred(given: object = None) -> bool:
    """Whether it is required, or preferred where available (``use_deterministic_algorithms(True, warn_only=True)``)."""
    return torch.are_deterministic_algorithms_enabled() or required(given)


def required_on_native(config: Any) -> tuple[bool, str]:
    """Whether Transformers' flash path is set to a deterministic gradient, and the setting that does it. It reads the
    environment variable or a key of the config, not torch's setting (transformers 5.24).

    Args:
        config: of the model.
    """
    key = "deterministic_flash_attn"
    own = getattr(config.get_text_config(), key, None)
    if own is not None:
        return bool(own), f"config.{key}=True"
    return os.environ.get(DETERMINISTIC_VARIABLE) == "1", f"{DETERMINISTIC_VARIABLE}=1"
