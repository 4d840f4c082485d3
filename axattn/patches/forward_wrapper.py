"""Patch: an `ForwardWrapper` in the place of a model's ``forward``, for changes that need inputs and outputs together.

A hook would not do: PEFT calls ``model.forward`` itself, past every hook of the model.

Others put theirs in the place of ``forward`` too. Most of them call the one that was there (accelerate's autocast and
its hooks for offloaded weights); TRL's trainers (1.16) and Liger's fused losses call the model inside instead, as does
whoever computes a loss from hidden states. So a change around a whole model (`add_model_wrappers`) stands at every
model inside as well, and holds for the outermost that is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from axattn.documents.forward_context import Context, current, slot
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.caches import cache_length
from axattn.hf.foreign_code import packages_of
from axattn.hf.forward_inputs import caches_of, takes_cache
from axattn.hf.module_walk import modules_of
from axattn.hf.source_inspection import calls_interface, code_of, signature_of, source_of
from axattn.hf.weak_cache import weak_cache
from axattn.patches.patchset import PatchSet
from axattn.traits.token_mixers import text_model

Forward = Callable[[dict[str, Any]], Any]
Change = Callable[[torch.nn.Module, Forward, dict[str, Any]], Any]

_KEPT = "_axattn_kept_entrances"
_CALL_ON = frozenset({"accelerate", "axattn", "deepspeed", "peft", "torch", "transformers"})
"""Packages whose forwards in the place of a model's call the one that was there, with the inputs as they came."""


class ForwardWrapper:
    """A model's ``forward`` with a change around it. Picklable and copyable with its model.

    Args:
        model: whose ``forward`` it is.
        change: called with the model, its ``forward`` (which takes a dict of inputs) and the inputs by name; returns
            the output. None once it is taken back: somebody else's ``forward`` may go on calling the entrance.
        inner: the entrance that was there before, None for the class's own ``forward``.
    """

    def __init__(self, model: torch.nn.Module, change: Change | None, inner: Any = None) -> None:
        self.model = model
        self.change = change
        self.inner = inner

    def of(self, model: torch.nn.Module) -> ForwardWrapper:
        """The same change around the ``forward`` of another copy of the model."""
        return ForwardWrapper(
            model, self.change, self.inner.of(model) if isinstance(self.inner, ForwardWrapper) else self.inner
        )

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the ``forward`` inside: Trainer reads it to know which columns of a data set to keep."""
        cls: Any = type(self.model)
        return inspect.signature(self.inner if self.inner is not None else cls.forward.__get__(self.model))

    @property
    def innermost(self) -> Any:
        """What stood in the model's ``forward`` before all entrances, None for the class's own."""
        return self.inner.innermost if isinstance(self.inner, ForwardWrapper) else self.inner

    def _run(self, inputs: dict[str, Any]) -> Any:
        """The ``forward`` inside, on inputs by name."""
        if self.inner is not None:
            return self.inner(**inputs)
        cls: Any = type(self.model)
        # no bound method: after a graph break torch.compile makes one again by its name, and would find this entrance
        return cls.forward(self.model, **inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's ``forward``."""
        inputs = dict(kwargs)
        if args and args[0] is self.model:  # bound to it once more: accelerate's unwrap_model(keep_fp32_wrapper=False)
            args = args[1:]
        if args:
            named = signature_of(self.model).bind_partial(self.model, *args).arguments
            inputs = {**dict(list(named.items())[1:]), **kwargs}
        return self._run(inputs) if self.change is None else self.change(self.model, self._run, inputs)


def wants_cache(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a forward reads a cache, or its caller may go on from the one that it returns (whole, padded rows).

    Without a word (``use_cache``) the model's config decides; in training and with labels nobody goes on from it, and
    encoders (BERT, whose config says ``use_cache`` all the same) return none.
    """
    asked = inputs.get("use_cache")
    if caches_of(inputs):
        return True
    if asked is not None:
        return bool(asked)
    if not getattr(model.config, "use_cache", False) or model.training or inputs.get("labels") is not None:
        return False
    forwards = (code_of(model).forward, code_of(model.base_model).forward)
    if not any(_takes_cache(forward) for forward in forwards):
        return False
    # a forward may make that depend on a `config.is_decoder` that is False
    is_decoder = bool(getattr(model.config, "is_decoder", False))
    return is_decoder or not any("is_decoder" in source_of(forward) for forward in forwards)


@weak_cache
def _takes_cache(forward: Any) -> bool:
    return takes_cache(inspect.signature(forward))


class _Replicate:
    """A model's ``_replicate_for_data_parallel``: each replica gets an `ForwardWrapper` of its own.

    ``nn.DataParallel``, which Trainer uses with several GPUs in one process, copies the original's, which would run the
    original's weights. So it does with a ``forward`` that somebody else has put there.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self) -> torch.nn.Module:
        """A replica, still without its parameters."""
        cls: Any = type(self.model)
        replica: torch.nn.Module = cls._replicate_for_data_parallel(self.model)
        entrance: Any = self.model.forward
        if isinstance(entrance, ForwardWrapper):
            replica.forward = entrance.of(replica)
        return replica


def add_entrance(patches: PatchSet, model: torch.nn.Module, change: Change) -> None:
    """Put a change around a model's ``forward``.

    Where somebody else's ``forward`` stands around an entrance that was taken back, that one is put to use again.
    """
    before = vars(model).get("forward")
    kept: list[ForwardWrapper] = vars(model).pop(_KEPT, [])
    if kept and before is not None:
        entrance = kept.pop()
        entrance.change = change
        if kept:
            vars(model)[_KEPT] = kept
    else:
        entrance = ForwardWrapper(model, change, before)
        patches.put_method(model, "forward", entrance)
        if not isinstance(before, ForwardWrapper):
            patches.set_attribute(model, "_replicate_for_data_parallel", _Replicate(model))
    patches.add_undo(_take_back, model, entrance)


def changes_around(model: torch.nn.Module) -> list[Any]:
    """The changes around a model's ``forward``, outermost first; not those inside of a ``forward`` of somebody else."""
    found, entrance = [], vars(model).get("forward")
    while isinstance(entrance, ForwardWrapper):
        found.append(entrance.change)
        entrance = entrance.inner
    return found


def _take_back(model: torch.nn.Module, entrance: ForwardWrapper) -> None:
    """Undo `add_entrance`: a ``forward`` that somebody has put around the entrance since goes on calling it."""
    entrance.change = None
    if vars(model).get("forward", entrance) is not entrance:
        vars(model).setdefault(_KEPT, []).append(entrance)


class WholeModel(Protocol):
    """A change around a whole model."""

    def __call__(self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
        """As for `Change`."""

    def missed(self, context: Context) -> str:
        """What a forward of the model misses that this change is not around, "" for nothing. It uses no cache.

        Args:
            context: of that forward.
        """


class OncePerCall:
    """A change around a whole model, which stands at every model inside too: the outermost that is called makes it."""

    def __init__(self, change: WholeModel) -> None:
        self.change = change

    def __call__(self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
        """As for `Change`."""
        here = slot()
        before = here.entered
        for one in before:
            if one is self:
                return forward(inputs)
        here.entered = (*before, self)
        try:
            return self.change(model, forward, inputs)
        finally:
            here.entered = before

    def require_entered(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model's first attention module: does its forward run inside of the change?

        Raises:
            UnsupportedAttentionError: something in the place of ``forward`` computes it in another way.
        """
        if torch.compiler.is_compiling() or self in slot().entered:
            return
        context = current()  # None in a layer by itself, or that runs again in a checkpoint
        caches = caches_of(kwargs)
        if module.training:  # the model makes one where nobody turns it off, and nobody goes on from it
            caches = [cache for cache in caches if cache_length(cache) > 0]
        missed = "" if context is None or caches else self.change.missed(context)
        if missed:
            text = "something else stands in the place of the model's forward, and does not call the one that was there"
            advice = (
                "Call axattn.apply (and axattn.sequence_parallel) on the model after whatever replaces its forward."
            )
            raise UnsupportedAttentionError(missed, [Reason("model", text)], advice)


def add_model_wrappers(patches: PatchSet, model: torch.nn.Module, change: WholeModel, *, at_head: bool) -> None:
    """Put a change around a whole model, wherever it may be called from.

    Args:
        patches: takes it over.
        model: a ``PreTrainedModel``.
        change: to be made once for each call of the model, or of a model inside of it.
        at_head: also around a ``forward`` that somebody has put in the place of the model's and that may mean something
            else by its inputs (TRL's fused head); else the models inside have to do.
    """
    from transformers import PreTrainedModel

    once = OncePerCall(change)
    models = [module for module in modules_of(model) if isinstance(module, PreTrainedModel)]
    for inner in models:
        replaced = inner is model and not packages_of(vars(inner).get("forward")) <= _CALL_ON
        if at_head or not replaced or len(models) == 1:
            add_entrance(patches, inner, once)
    first = next((inner for inner in modules_of(text_model(model)) if calls_interface(type(inner))), None)
    if first is not None:
        patches.add_handle(first.register_forward_pre_hook(once.require_entered, with_kwargs=True))
