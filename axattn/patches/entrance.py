"""Patch: an `Entrance` in the place of a model's ``forward``, for changes that need inputs and outputs together.

A hook would not do: PEFT calls ``model.forward`` itself, past every hook of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from axattn.hf.forward_inputs import caches_of, takes_cache
from axattn.hf.source_inspection import code_of, signature_of, source_of
from axattn.patches.patchset import PatchSet
from axattn.weak_cache import weak_cache

Forward = Callable[[dict[str, Any]], Any]
Change = Callable[[torch.nn.Module, Forward, dict[str, Any]], Any]


class Entrance:
    """A model's ``forward`` with a change around it. Picklable and copyable with its model.

    Args:
        model: whose ``forward`` it is.
        change: called with the model, its ``forward`` (which takes a dict of inputs) and the inputs by name; returns
            the output.
        inner: the entrance that was there before, None for the class's own ``forward``.
    """

    def __init__(self, model: torch.nn.Module, change: Change, inner: Any = None) -> None:
        self.model = model
        self.change = change
        self.inner = inner

    def of(self, model: torch.nn.Module) -> Entrance:
        """The same change around the ``forward`` of another copy of the model."""
        return Entrance(model, self.change, self.inner.of(model) if isinstance(self.inner, Entrance) else self.inner)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the ``forward`` inside: Trainer reads it to know which columns of a data set to keep."""
        cls: Any = type(self.model)
        return inspect.signature(self.inner if self.inner is not None else cls.forward.__get__(self.model))

    @property
    def innermost(self) -> Any:
        """What stood in the model's ``forward`` before all entrances, None for the class's own."""
        return self.inner.innermost if isinstance(self.inner, Entrance) else self.inner

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
        if args:
            named = signature_of(self.model).bind_partial(self.model, *args).arguments
            inputs = {**dict(list(named.items())[1:]), **kwargs}
        return self.change(self.model, self._run, inputs)


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
    """A model's ``_replicate_for_data_parallel``: each replica gets an `Entrance` of its own.

    ``nn.DataParallel``, which Trainer uses with several GPUs in one process, copies the original's, which would run the
    original's weights.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self) -> torch.nn.Module:
        """A replica, still without its parameters."""
        cls: Any = type(self.model)
        replica: torch.nn.Module = cls._replicate_for_data_parallel(self.model)
        entrance: Any = self.model.forward
        replica.forward = entrance.of(replica)
        return replica


def add_entrance(patches: PatchSet, model: torch.nn.Module, change: Change) -> None:
    """Put a change around a model's ``forward``."""
    before = vars(model).get("forward")
    patches.set_attribute(model, "forward", Entrance(model, change, before))
    if not isinstance(before, Entrance):
        patches.set_attribute(model, "_replicate_for_data_parallel", _Replicate(model))
