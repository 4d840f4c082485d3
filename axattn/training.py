"""`prepare_for_training`: prepares a model for a packed fine-tune, with patches that `axattn.restore` undoes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

import torch

from axattn.patches.cache import disable_cache
from axattn.patches.dtype import cast_stray_weights
from axattn.patches.state import ensure_state, transformers_model
from axattn.spec import names
from axattn.traits.layer_needs import sub_configs

logger = logging.getLogger("axattn")

Model = TypeVar("Model", bound=torch.nn.Module)


def prepare_for_training(model: Model) -> Model:
    """Turn ``use_cache`` off in every sub-config, and cast stray fp32 weights to the model's 16-bit dtype.

    Only embeddings and norms are cast, and only if the kernel needs one dtype (``attn_needs_dtype_cast``).
    Works with and without PEFT, and on models prepared for k-bit training. An fp32 model stays fp32.

    Args:
        model: a Transformers model, or a wrapper around one.

    Returns:
        `model`, changed in place.
    """
    base = transformers_model(model)
    state = ensure_state(base)
    patches = state.patches
    if prepare_for_training not in state.later:
        state.later.append(prepare_for_training)
    changed = disable_cache(patches, base)
    if changed:
        logger.info("axattn: use_cache=False on %s", ", ".join(path or "the model's config" for path in changed))
    if needs_dtype_cast(base):
        cast = cast_stray_weights(patches, model)
        if cast:
            logger.info("axattn: cast %d fp32 embeddings and norms (%s, ...)", len(cast), cast[0])
    return model


def needs_dtype_cast(model: torch.nn.Module) -> bool:
    """Whether any kernel that the model runs on needs q, k and v in one 16-bit dtype."""
    running: Mapping[str, str | None] = {p: c._attn_implementation for p, c in sub_configs(model.config)}
    return any(name is not None and _known(name) and names.flags(name).dtype_cast for name in running.values())


def _known(name: str) -> bool:
    return name in (*names.CANONICAL, *names.installed()) or "/" in name
