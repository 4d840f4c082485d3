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
    """Split the rows of every batch over the ranks of a group, S / P tokens each, around the planned kernels.

    Pass the same whole batch to every rank of the group; each works on its part of each row, and attention exchanges
    tokens for heads (DeepSpeed Ulysses, arXiv:2309.14509). Packed rows, windows, padding and lengths that P does not
    divide are supported; KV heads fewer than P are repeated.

    Every rank returns the loss of the whole batch; its gradient is the average of the gradients over the ranks (which
    DDP and FSDP compute, else `axattn.parallel.average_gradients`). With a cache (``generate``; ``use_cache=False``
    turns it off) each rank runs the whole rows.

    Args:
        model: runs on axattn backends (`axattn.apply`); it may be wrapped before or after.
        group: a process group, a one-dimensional ``DeviceMesh``, or an accelerate ``Accelerator`` whose
            ``ParallelismConfig`` comes from `axattn.parallel.accelerate_config`.
        gather: gather the ranks' logits and hidden states: always, never, or ``"auto"``: except in training with
            labels, which needs only the loss.

    Returns:
        `model`, changed in place; `axattn.restore` undoes it.

    Raises:
        UnsupportedAttentionError: the model mixes tokens outside of attention, its heads can't be divided, or it runs
            on a native name; lists every reason.
        InvalidInputError: `group`, `model` or `gather` is invalid.
    """
    if gather not in (True, False, "auto"):
        raise InvalidInputError(f'gather={gather!r} is not one of True, False, "auto"')
    mean = hasattr(group, "parallelism_config")
    _split(transformers_model(model), group=Group(process_group(group)), gather=gather, mean=mean)
    return model


def _split(model: torch.nn.Module, *, group: Group, gather: Gather, mean: bool, reapplied: bool = False) -> None:
    """Wrap a model in a `Split`, now and after every later `axattn.apply`."""
    reasons = reasons_against(model, group.ranks)
    if any(isinstance(change.change, Split) for change in changes_around(model) if isinstance(change, OncePerCall)):
        reasons.append(Reason("model", "it is sequence-parallel already"))
    state = state_of(model)
    if state is None or reasons:
        advice = "axattn.restore(model) removes its sequence parallelism." if reapplied else ""
        raise UnsupportedAttentionError(f"{type(model).__name__} can't run over {group.ranks} ranks", reasons, advice)
    add_model_wrappers(state.patches, model, Split(group, gather, state.patches, mean), at_head=True)
    state.later.append(functools.partial(_split, group=group, gather=gather, mean=mean, reapplied=True))


def process_group(group: Any) -> Any:
    """The process group of the `group` argument of `sequence_parallel`.

    Raises:
        InvalidInputError: it has none.
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
    """Wraps a model's ``forward``: it runs on this rank's part of the rows and returns the loss of the whole batch.

    Args:
        group: the ranks.
        gather: as for `sequence_parallel`.
        patches: of the model.
        mean: with ``num_items_in_batch``, return a rank's share of the loss: Transformers' Trainer multiplies it by the
            number of processes, including those that share a row (``Trainer.compute_loss``, transformers 5.17, 5.23).
    """

    def __init__(self, group: Group, gather: Gather, patches: Any, mean: bool) -> None:
        self.group = group
        self.gather = gather
        self.patches = patches
        self.mean = mean
        self.traits = ModelTraits()

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def __call__(self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
        """Run one forward and return the model's output. ``torch.compile`` does not trace this part: it reads documents
        and lengths and compares them between the ranks at run time."""
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
        ):  # input hooks of inner models use the shard; an inner model without a hook reads this context
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
        return "this batch would not be split over ranks, as axattn.sequence_parallel requires"


def _require_own_loss(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    """Raise if the loss of a training step is computed outside of the model: Trainer removes the labels and keeps
    ``num_items_in_batch`` (transformers 5.17 and 5.23), or another package has replaced the model's forward.

    Raises:
        UnsupportedAttentionError: every rank would hold the whole loss, which Trainer multiplies by all ranks.
    """
    training = model.training and torch.is_grad_enabled()
    head = ATTRIBUTE not in vars(model)  # an inner model was called: the outer forward has been replaced
    if training and inputs.get("labels") is None and (head or inputs.get("num_items_in_batch") is not None):
        text = (
            "a loss computed outside of the model (label smoothing, compute_loss_func, TRL's fused head) would count "
            "once per rank"
        )
        raise UnsupportedAttentionError(
            f"{type(model).__name__} can't train in Trainer with its rows split over ranks",
            [Reason("labels", text)],
            "Don't use label_smoothing_factor or compute_loss_func.",
        )
