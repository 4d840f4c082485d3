"""Sequence parallelism through accelerate's own ``ParallelismConfig``: its mesh, its data loader, its FSDP2."""

from __future__ import annotations

from typing import Any

import torch

from axattn.errors import InvalidInputError, Reason
from axattn.hf.integrations import takes_masks_away
from axattn.hf.torch_internals import pre_hooks, put_pre_hook, take_pre_hook
from axattn.parallel.estimates import require_counts
from axattn.patches.patchset import PatchSet

BACKEND = "axattn"


def accelerate_config(size: int, **sizes: Any) -> Any:
    """A ``ParallelismConfig`` whose context-parallel dimension axattn serves.

    Accelerate builds the mesh from it, gives the ranks of a row the same batch and shards weights over all ranks
    (FSDP2, which it asks for). Pass it as ``Accelerator(parallelism_config=...)`` or
    ``TrainingArguments(parallelism_config=...)``, then call ``axattn.sequence_parallel(model, accelerator)``.

    Its own backend (ring attention) runs on ``sdpa`` only and drops masks; this config names another backend, for
    which accelerate and Trainer leave inputs and attention alone (accelerate 1.15, transformers 5.23).

    Args:
        size: ranks that share a row (``cp_size``).
        **sizes: further keywords of ``ParallelismConfig``, such as ``dp_shard_size``.

    Raises:
        InvalidInputError: sizes that are no whole numbers of 1 or more, or keywords that mean another kind of sequence
            parallelism or that accelerate does not take.
    """
    from accelerate import ParallelismConfig

    clash = [key for key in sizes if key.startswith(("cp_", "sp_")) and sizes[key] not in (None, 1)]
    if clash:
        raise InvalidInputError(f"{', '.join(clash)} can't be combined with axattn's sequence parallelism")
    given = {
        "size": size,
        **{key: value for key, value in sizes.items() if key.endswith("_size") and value is not None},
    }
    require_counts(given)
    try:
        config = ParallelismConfig(cp_size=size, **sizes)
    except (TypeError, ValueError) as error:
        raise InvalidInputError("accelerate takes no such sizes", [Reason("size", str(error))]) from error
    config.cp_backend = BACKEND  # after its own checks, which know one name
    return config


def mesh_of(accelerator: Any) -> Any:
    """The mesh dimension of an ``Accelerator`` that shares rows.

    Raises:
        InvalidInputError: its ``ParallelismConfig`` is not ours.
    """
    config = accelerator.parallelism_config
    advice = "Build it with axattn.parallel.accelerate_config(size, ...)."
    if config is None or not config.cp_enabled:
        raise InvalidInputError("this Accelerator's ParallelismConfig shares no rows", advice=advice)
    if config.cp_backend != BACKEND:
        text = f"this Accelerator's ParallelismConfig has cp_backend={config.cp_backend!r}, which runs on sdpa alone"
        raise InvalidInputError(text, advice=advice)
    return accelerator.torch_device_mesh["cp"]


def drop_context_parallel_hooks(patches: PatchSet, model: torch.nn.Module) -> None:
    """Take off the hooks by which ``Accelerator.prepare`` takes masks away from every attention module.

    Accelerate puts them on for every context-parallel config, whatever the backend (1.15); restoring the model puts
    them back.
    """
    for module in model.modules():
        for hook in pre_hooks(module):
            if takes_masks_away(hook):
                patches.add_undo(put_pre_hook, module, hook, *take_pre_hook(module, hook))
