"""Sequence parallelism through accelerate's ``ParallelismConfig``: its mesh, data loader and FSDP2."""

from __future__ import annotations

from typing import Any

import torch

from axattn.errors import InvalidInputError, Reason
from axattn.hf.integrations import removes_masks
from axattn.hf.torch_internals import pre_hooks, put_pre_hook, take_pre_hook
from axattn.parallel.estimates import require_counts
from axattn.patches.patchset import PatchSet

BACKEND = "axattn"


def accelerate_config(size: int, **sizes: Any) -> Any:
    """A ``ParallelismConfig`` whose context-parallel dimension axattn serves.

    Accelerate builds the mesh from it, gives the ranks of a row the same batch and shards weights over all ranks
    (it requires FSDP2). Pass it as ``Accelerator(parallelism_config=...)`` or
    ``TrainingArguments(parallelism_config=...)``, then call ``axattn.sequence_parallel(model, accelerator)``.

    Accelerate's own backend (ring attention) runs on ``sdpa`` only and drops masks. This config names another backend,
    for which accelerate and Trainer don't change inputs and attention (accelerate 1.15, transformers 5.23).

    Args:
        size: ranks that share a row (``cp_size``).
        **sizes: further keywords of ``ParallelismConfig``, such as ``dp_shard_size``.

    Raises:
        InvalidInputError: a size is not a positive integer, or a keyword means another kind of sequence parallelism or
            is unknown to accelerate.
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
        raise InvalidInputError("accelerate rejects these sizes", [Reason("size", str(error))]) from error
    config.cp_backend = BACKEND  # set after accelerate's checks, which accept one name only
    return config


def mesh_of(accelerator: Any) -> Any:
    """The mesh dimension of an ``Accelerator`` whose ranks share rows.

    Raises:
        InvalidInputError: its ``ParallelismConfig`` was not built by `accelerate_config`.
    """
    config = accelerator.parallelism_config
    advice = "Build it with axattn.parallel.accelerate_config(size, ...)."
    if config is None or not config.cp_enabled:
        raise InvalidInputError("this Accelerator's ParallelismConfig has no context parallelism", advice=advice)
    if config.cp_backend != BACKEND:
        text = f"this Accelerator's ParallelismConfig has cp_backend={config.cp_backend!r}, which runs on sdpa alone"
        raise InvalidInputError(text, advice=advice)
    return accelerator.torch_device_mesh["cp"]


def drop_context_parallel_hooks(patches: PatchSet, model: torch.nn.Module) -> None:
    """Remove the hooks with which ``Accelerator.prepare`` drops the masks of every attention module.

    Accelerate adds them for every context-parallel config, whatever the backend (1.15). Restoring the model restores
    them.
    """
    for module in model.modules():
        for hook in pre_hooks(module):
            if removes_masks(hook):
                patches.add_undo(put_pre_hook, module, hook, *take_pre_hook(module, hook))
