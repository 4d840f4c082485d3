"""Changes to a loaded model, each undone exactly: `PatchSet` and one file a patch."""

from axattn.patches.patchset import PatchSet

__all__ = ["PatchSet"]
