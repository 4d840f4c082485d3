"""Patch: ``use_cache=False`` on every config of a model (Transformers' Trainer sets it on the outermost only)."""

from __future__ import annotations

import torch

from axattn.patches.patchset import PatchSet
from axattn.traits.layer_needs import sub_configs


def disable_cache(patches: PatchSet, model: torch.nn.Module) -> list[str]:
    """Set ``use_cache = False`` on every config and generation config where it is on; returns the changed paths."""
    changed = []
    for path, config in sub_configs(model.config):
        if getattr(config, "use_cache", False):
            patches.set_attribute(config, "use_cache", False)
            changed.append(path)
    return changed
