"""`sequence_parallel`: the patch that splits a model's rows over ranks."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from axattn.documents.forward_context import BoundaryInputs, Context, assume, current, reading
from axattn.documents.inputs import require_axattn_backend
from axattn.documents.placement import Placement, place
from axattn.errors import InvalidInputError, Reason, UnsupportedAttentionError
from axattn.parallel import accelerate
from axattn.parallel.checks import reasons_against
from axattn.parallel.collectives import process_groups, total
from axattn.parallel.split_inputs import Group, documents_of, join, place_tokens, read_batch, split_rows
from axattn.parallel.strategy import LayerSizes, Strategy, fetch_values, layer_sizes, require_strategy, ulysses_values
from axattn.parallel.whole_batch import Batch
from axattn.patches.forward_wrapper import Forward, OncePerCall, add_model_wrappers, changes_around, wants_cache
from axattn.patches.state import ATTRIBUTE, state_of, transformers_model
from axattn.traits.model_traits import ModelTraits
from axattn.traits.recurrent import recurrent
from axattn.traits.token_mixers import text_model

Model = TypeVar("Model", bound=torch.nn.Module)
Gather = bool | Literal["auto"]


def sequence_parallel(model: Model, group: Any, *, strategy: Strategy = "auto", gather: Gather = "auto") -> Model:
    """Split the tokens of every batch over the ranks of a group, around the planned kernels.

    Pass the same whole batch to every rank of the group; each works on its part of it. Attention gets what it lacks by
    one of two strategies:

    - ``"ulysses"``: each rank holds S / P consecutive tokens of every row, and exchanges tokens for heads (DeepSpeed
      Ulysses, arXiv:2309.14509). P must divide the heads; KV heads fewer than P are repeated.
    - ``"fetch"``: documents are placed on ranks so that all have equal work (`axattn.documents.placement`), and each
      rank fetches the keys that its queries attend to. Any number of ranks and heads; layers with a state (Mamba,
      linear attention) run each document on one rank.

    ``"auto"`` takes what serves the model; where both do, the one that sends less, decided for each batch. On a
    two-dimensional mesh tokens are placed on the ranks of its first dimension, and those of its second one share them
    by exchanging heads. Packed rows, windows, padding and any length are supported.

    Every rank returns the loss of the whole batch; its gradient is the average of the gradients over the ranks (which
    DDP and FSDP compute, else `axattn.parallel.average_gradients`). With a cache (``generate``; ``use_cache=False``
    turns it off) each rank runs the whole rows.

    Args:
        model: runs on axattn backends (`axattn.apply`); it may be wrapped before or after.
        group: a process group, a ``DeviceMesh`` of one or two dimensions, or an accelerate ``Accelerator`` whose
            ``ParallelismConfig`` comes from `axattn.parallel.accelerate_config`.
        strategy: ``"auto"``, ``"ulysses"`` or ``"fetch"``; ``"auto"`` on a two-dimensional mesh.
        gather: gather the ranks' logits and hidden states: always, never, or ``"auto"``: except in training with
            labels, which needs only the loss.

    Returns:
        `model`, changed in place; `axattn.restore` undoes it.

    Raises:
        UnsupportedAttentionError: the model mixes tokens outside of attention, its heads can't be divided, or it runs
            on a native name; lists every reason.
        InvalidInputError: `group`, `model`, `strategy` or `gather` is invalid.
    """
    if gather not in (True, False, "auto"):
        raise InvalidInputError(f'gather={gather!r} is not one of True, False, "auto"')
    require_strategy(strategy)
    base, mean = transformers_model(model), hasattr(group, "parallelism_config")
    found = ranks_of(group)
    if found.outer is not None and strategy != "auto":
        text = f'strategy="{strategy}" on a mesh of two dimensions, which uses both'
        raise InvalidInputError(text, advice="Leave strategy out, or give a mesh of one dimension.")
    _split(base, group=found, strategy=strategy, gather=gather, mean=mean)
    return model


def _split(
    model: torch.nn.Module, *, group: Group, strategy: Strategy, gather: Gather, mean: bool, reapplied: bool = False
) -> None:
    """Wrap a model in a `Split`, now and after every later `axattn.apply`."""
    ways, reasons = _ways(model, group, strategy)
    if any(isinstance(change.change, Split) for change in changes_around(model) if isinstance(change, OncePerCall)):
        reasons.append(Reason("model", "it is sequence-parallel already"))
    state = state_of(model)
    if state is None or state.plan is None or reasons:
        advice = "axattn.restore(model) removes its sequence parallelism." if reapplied else ""
        raise UnsupportedAttentionError(f"{type(model).__name__} can't run over {group.ranks} ranks", reasons, advice)
    needs = [entry.layer.need for entry in state.plan.layers]
    ways = replace(ways, windows=any(one.window is not None or one.chunk is not None for one in needs))
    ways = replace(ways, state=bool(recurrent(text_model(model))), shares=state.share_prefixes)
    ways = replace(ways, sizes=layer_sizes(needs))
    change = Split(group, ways, gather, state.patches, mean)
    add_model_wrappers(state.patches, model, change, at_head=True)
    again = functools.partial(_split, group=group, strategy=strategy, gather=gather, mean=mean, reapplied=True)
    state.later.append(again)


@dataclass(frozen=True)
class Ways:
    """How the batches of a model may be split.

    Attributes:
        ulysses: by exchanging heads.
        fetch: by fetching keys.
        state: a layer has a state, and runs whole documents.
        shares: prefixes of documents run once if tokens are placed (``share_prefixes=True``).
        windows: a layer has a window or chunks, which padding between the tokens of a document would shift.
        sizes: of its layers; None if unknown.
    """

    ulysses: bool
    fetch: bool
    state: bool = False
    shares: bool = False
    windows: bool = False
    sizes: list[LayerSizes] | None = None


def _ways(model: torch.nn.Module, group: Group, strategy: Strategy) -> tuple[Ways, list[Reason]]:
    """How a model may be split, and every reason if it can't be as asked."""
    heads = torch.distributed.get_world_size(group.handle)
    if group.outer is not None:
        found = [*reasons_against(model, heads, "ulysses"), *reasons_against(model, group.ranks, "fetch")]
        return Ways(True, True), list(dict.fromkeys(found))
    against = {
        way: reasons_against(model, heads, way) if strategy in ("auto", way) else [] for way in ("ulysses", "fetch")
    }
    ulysses, fetch = (strategy in ("auto", way) and not found for way, found in against.items())
    ways = Ways(ulysses, fetch)
    found = [] if ways.ulysses or ways.fetch else [*against["ulysses"], *against["fetch"]]
    return ways, list(dict.fromkeys(found))


def ranks_of(group: Any) -> Group:
    """The ranks of the `group` argument of `sequence_parallel`.

    Raises:
        InvalidInputError: it has none.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        raise InvalidInputError("torch.distributed is not initialised", advice="Start the script with torchrun.")
    if hasattr(group, "parallelism_config"):
        group = accelerate.mesh_of(group)
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        if group.ndim > 2:
            names = ", ".join(group.mesh_dim_names or ())
            text = f"the mesh has {group.ndim} dimensions ({names})"
            raise InvalidInputError(text, advice='Give those that share rows: mesh["sp"].')
        return Group(*reversed(process_groups(group)))
    if not isinstance(group, dist.ProcessGroup):
        raise InvalidInputError(
            f"group is a {type(group).__name__}", advice='Give a process group or mesh["sp"] of a DeviceMesh.'
        )
    return Group(group)


class Split:
    """Wraps a model's ``forward``: it runs on this rank's part of the rows and returns the loss of the whole batch.

    Args:
        group: the ranks.
        ways: how its batches may be split.
        gather: as for `sequence_parallel`.
        patches: of the model.
        mean: with ``num_items_in_batch``, return a rank's share of the loss: Transformers' Trainer multiplies it by the
            number of processes, including those that share a row (``Trainer.compute_loss``, transformers 5.17, 5.23).
    """

    def __init__(self, group: Group, ways: Ways, gather: Gather, patches: Any, mean: bool) -> None:
        self.group = group
        self.ways = ways
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
        batch = read_batch(model, self.group, inputs, self.traits)
        placement = self._placement(model, batch)
        if placement is None:
            shard, part = split_rows(batch, self.group)
        else:
            shard, part = place_tokens(batch, self.group, placement, self.ways.state)
        as_tuple = part.get("return_dict") is False
        own = Context(None, (shard.rows, shard.part), False, BoundaryInputs(), self, current(), shard)
        with (
            assume(shard=shard),
            reading(own),
        ):  # input hooks of inner models use the shard; an inner model without a hook reads this context
            output = forward({**part, "return_dict": True})
        if output.get("loss") is not None:
            loss = output["loss"]
            for handle in self.group.handles:
                loss = total(loss, handle)
            share = self.mean and inputs.get("num_items_in_batch") is not None
            output["loss"] = loss / self.group.ranks if share else loss
        wanted = self.gather
        if wanted == "auto":
            wanted = not (model.training and output.get("loss") is not None)
        if wanted:
            join(output, shard, batch.rows, batch.length)
        return output.to_tuple() if as_tuple else output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _placement(self, model: torch.nn.Module, batch: Batch) -> Placement | None:
        """Where the tokens of a batch are placed; None to split its rows.

        Raises:
            UnsupportedAttentionError: there is padding between the tokens of a document, and a window.
        """
        if not self.ways.fetch:
            return None
        documents, holes = documents_of(batch)
        group, both = self.group, self.group.outer is not None
        if holes and self.ways.windows:
            if self.ways.ulysses and not both:
                return None
            text = "padding between the tokens of a document, which its windows count"
            raise UnsupportedAttentionError(
                f"{type(model).__name__} can't run this batch over {group.ranks} ranks",
                [Reason("non_contiguous_padding", text)],
                'Use strategy="ulysses", or pad at the end of rows.',
            )
        inner = torch.distributed.get_world_size(group.handle) if both else 1
        placed = place(documents, batch.rows * batch.length, group.ranks // inner, inner)
        if both or self.ways.shares or not self.ways.ulysses:
            return placed
        tokens = -(-batch.length // group.ranks) * batch.rows
        sizes = self.ways.sizes
        if sizes is None or fetch_values(sizes, placed) >= ulysses_values(sizes, tokens, group.ranks):
            return None
        return placed

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
