"""Reversible changes to a loaded model: `PatchSet`, and one file per patch."""

from axattn.patches.patchset import PatchSet

__all__ = ["PatchSet"]
