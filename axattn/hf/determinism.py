"""Gradients that are the same to the bit each time: who asks for them.

Asked for by a layer's keyword ``deterministic`` (ModernBERT's ``config.deterministic_flash_attn``) or
``FLASH_ATTENTION_DETERMINISTIC=1``, as Transformers has it, or by ``torch.use_deterministic_algorithms(True)``;
``transformers.enable_full_determinism`` sets the last two. FlashAttention takes it as an argument; torch's own kernels
follow ``torch.use_deterministic_algorithms`` alone. Forwards are deterministic on every kernel.
"""

from __future__ import annotations

import os
from typing import Any

import torch

DETERMINISTIC_VARIABLE = "FLASH_ATTENTION_DETERMINISTIC"


def asked(given: object = None) -> bool:
    """Whether a deterministic gradient is asked for, and nothing else will do.

    Args:
        given: a layer's keyword ``deterministic``; None where it gives none.
    """
    if given is None:
        given = os.environ.get(DETERMINISTIC_VARIABLE) == "1"
    return bool(given) or (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def wanted(given: object = None) -> bool:
    """`asked`, or to be given where there is one (``torch.use_deterministic_algorithms(True, warn_only=True)``)."""
    return torch.are_deterministic_algorithms_enabled() or asked(given)


def asked_of_native(config: Any) -> tuple[bool, str]:
    """Whether a deterministic gradient is asked of Transformers' flash path, which reads the environment variable or a
    key of the config and not torch's setting (transformers 5.24); and what would ask it.

    Args:
        config: of the model.
    """
    key = "deterministic_flash_attn"
    own = getattr(config.get_text_config(), key, None)
    if own is not None:
        return bool(own), f"config.{key}=True"
    return os.environ.get(DETERMINISTIC_VARIABLE) == "1", f"{DETERMINISTIC_VARIABLE}=1"
