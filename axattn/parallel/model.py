"""`sequence_parallel`: the patch that splits a model's rows over ranks."""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeVar

import torch

from axattn.documents.forward_context import BoundaryInputs, Context, assume, current, reading
from axattn.documents.inputs import require_axattn_backend
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.parallel import accelerate
from axattn.parallel.checks import reasons_against
from axattn.parallel.collectives import total
from axattn.parallel.split_inputs import Group, join, split
from axattn.patches.forward_wrapper import Forward, OncePerCall, add_model_wrappers, changes_around, wants_cache
from axattn.patches.state import ATTRIBUTE, state_of, transformers_model
from axattn.traits.model_traits import ModelTraits

Model = TypeVar("Model", bound=torch.nn.Module)
Gather = bool | Literal["auto"]


def sequence_parallel(model: Model, group: Any, *, gather: Gather = "auto") -> Model:
    """Split the rows of every batch over the ranks of a group, S / P tokens each, around the kernels the plan chose.

    Every rank of the group is given the same, whole batch and works on its part of each row; inside attention, heads
    are exchanged for tokens (DeepSpeed Ulysses, arXiv:2309.14509). Packed rows, windows, padding and lengths that P
    does not divide are served; KV heads fewer than P are repeated.

    The loss is that of the whole batch, on every rank; the average of the gradients over the ranks (which DDP and FSDP
    take; else `axattn.parallel.average_gradients`) is its gradient. With a cache (``generate``; ``use_cache=False``
    turns it off) each rank runs the whole rows by itself.

    Args:
        model: runs on axattn backends (`axattn.apply`); it may be wrapped before or after.
        group: a process group, a one-dimensional ``DeviceMesh``, or an accelerate ``Accelerator`` whose
            ``ParallelismConfig`` comes from `axattn.parallel.accelerate_config`.
        gather: put the ranks' logits and hidden states together: always, never, or ``"auto"``: except in training
            with labels, where the loss is all that is needed.

    Returns:
        `model`, changed in place; `axattn.restore` undoes it.

    Raises:
        UnsupportedAttentionError: the model mixes tokens elsewhere than in attention, its heads can't be shared out,
            or it runs on a name that Transformers serves; with every reason.
        InvalidInputError: `group` is no group, `model` no model, or `gather` none of these.
    """
    if gather not in (True, False, "auto"):
        raise InvalidInputError(f'gather={gather!r} is none of True, False, "auto"')
    mean = hasattr(group, "parallelism_config")
    _split(transformers_model(model), group=Group(process_group(group)), gather=gather, mean=mean)
    return model


def _split(model: torch.nn.Module, *, group: Group, gather: Gather, mean: bool, again: bool = False) -> None:
    """Put a `Split` around a model, now and after every later `axattn.apply`."""
    reasons = reasons_against(model, group.ranks)
    if any(isinstance(change.change, Split) for change in changes_around(model) if isinstance(change, OncePerCall)):
        reasons.append(Reason("model", "it is sequence-parallel already"))
    state = state_of(model)
    if state is None or reasons:
        advice = "axattn.restore(model) takes the split off that it has." if again else ""
        raise UnsupportedAttentionError(f"{type(model).__name__} can't run over {group.ranks} ranks", reasons, advice)
    add_model_wrappers(state.patches, model, Split(group, gather, state.patches, mean), at_head=True)
    state.later.append(functools.partial(_split, group=group, gather=gather, mean=mean, again=True))


def process_group(group: Any) -> Any:
    """The process group of what a user calls a group.

    Raises:
        InvalidInputError: it is none.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        raise InvalidInputError("torch.distributed is not initialised", advice="Start the script with torchrun.")
    if hasattr(group, "parallelism_config"):
        group = accelerate.mesh_of(group)
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            names = ", ".join(group.mesh_dim_names or ())
            raise InvalidInputError(f"the mesh has {group.ndim} dimensions ({names})", advice='Give one: mesh["sp"].')
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise InvalidInputError(
            f"group is a {type(group).__name__}", advice='Give a process group or mesh["sp"] of a DeviceMesh.'
        )
    return group


class Split:
    """The change around a model's ``forward``: this rank's part of the rows in, the loss of the whole batch out.

    Args:
        group: the ranks.
        gather: as for `sequence_parallel`.
        patches: of the model.
        mean: who gives ``num_items_in_batch`` expects a rank's own loss: Transformers' Trainer multiplies it by all
            processes, those that share a row included (``Trainer.compute_loss``, transformers 5.17 and 5.23).
    """

    def __init__(self, group: Group, gather: Gather, patches: Any, mean: bool) -> None:
        self.group = group
        self.gather = gather
        self.patches = patches
        self.mean = mean
        self.traits = ModelTraits()

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def __call__(self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
        """Run one forward; returns the model's output. Of a compiled model this part is not traced: documents and
        lengths are read, and agreed on between the ranks, when it runs."""
        if wants_cache(model, inputs):
            return forward(inputs)  # a cache holds whole rows
        require_axattn_backend(self.traits, model)
        if self.mean:
            _require_own_loss(model, inputs)
        accelerate.drop_context_parallel_hooks(self.patches, model)
        shard, part, length = split(model, self.group, inputs, self.traits)
        as_tuple = part.get("return_dict") is False
        own = Context(None, (shard.rows, shard.part), False, BoundaryInputs(), self, current(), shard)
        with (
            assume(shard=shard),
            reading(own),
        ):  # input hooks inside take the share; a model without one inside reads its own
            output = forward({**part, "return_dict": True})
        if output.get("loss") is not None:
            loss = total(output["loss"], shard.group)
            output["loss"] = loss / shard.ranks if self.mean and inputs.get("num_items_in_batch") is not None else loss
        wanted = self.gather
        if wanted == "auto":
            wanted = not (model.training and output.get("loss") is not None)
        if wanted:
            join(output, shard, length)
        return output.to_tuple() if as_tuple else output

    def missed(self, context: Context) -> str:
        """See `axattn.patches.forward_wrapper.WholeModel`."""
        return "this batch would not be split over ranks, as axattn.sequence_parallel says"


def _require_own_loss(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    """Raise where Trainer will compute the loss of a training step outside of the model: it takes the labels away, and
    leaves ``num_items_in_batch`` (transformers 5.17 and 5.23); or a forward in the place of the model's does.

    Raises:
        UnsupportedAttentionError: it will. Every rank would hold the whole loss, which Trainer multiplies by all ranks.
    """
    training = model.training and torch.is_grad_enabled()
    head = ATTRIBUTE not in vars(model)  # a model inside of it was called: something stands in the place of its forward
    if training and inputs.get("labels") is None and (head or inputs.get("num_items_in_batch") is not None):
        text = (
            "a loss computed outside of the model (label smoothing, compute_loss_func, TRL's fused head) would count "
            "once for each rank"
        )
        raise UnsupportedAttentionError(
            f"{type(model).__name__} can't train in Trainer with its rows split over ranks",
            [Reason("labels", text)],
            "Leave label_smoothing_factor and compute_loss_func out.",
        )
