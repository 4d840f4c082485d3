"""Patch: a `ForwardWrapper` replaces a model's ``forward``, for changes that need inputs and outputs together.

A hook is not enough: PEFT calls ``model.forward`` directly, which skips the model's hooks.

Other libraries replace ``forward`` too. Most call the previous one (accelerate's autocast and its hooks for offloaded
weights); TRL's trainers (1.16), Liger's fused losses and other code that computes a loss from hidden states call the
inner model instead. So a change around a whole model (`add_model_wrappers`) wraps every inner model as well, and
applies once, in the outermost that is called.
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

_UNUSED = "_axattn_unused_wrappers"
_CALL_ON = frozenset({"accelerate", "axattn", "deepspeed", "peft", "torch", "transformers"})
"""Packages whose replacement of a ``forward`` calls the previous one with unchanged inputs."""


class ForwardWrapper:
    """A model's ``forward`` with a change around it. Picklable and copyable with its model.

    Args:
        model: the model.
        change: called with the model, its ``forward`` (which takes a dict of inputs) and the inputs by name; returns
            the output. None once it is undone: another library's ``forward`` may still call this wrapper.
        inner: the previous ``forward`` of the model, None for the class's own.
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
        """The signature of the wrapped ``forward``, which Trainer reads to select the columns of a data set."""
        cls: Any = type(self.model)
        return inspect.signature(self.inner if self.inner is not None else cls.forward.__get__(self.model))

    @property
    def innermost(self) -> Any:
        """The model's ``forward`` inside all wrappers, None for the class's own."""
        return self.inner.innermost if isinstance(self.inner, ForwardWrapper) else self.inner

    def _run(self, inputs: dict[str, Any]) -> Any:
        """Run the wrapped ``forward`` on inputs by name."""
        if self.inner is not None:
            return self.inner(**inputs)
        cls: Any = type(self.model)
        # not a bound method: after a graph break torch.compile looks that up by name and would find this wrapper
        return cls.forward(self.model, **inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the model's ``forward``."""
        inputs = dict(kwargs)
        if args and args[0] is self.model:  # bound twice: accelerate's unwrap_model(keep_fp32_wrapper=False)
            args = args[1:]
        if args:
            named = signature_of(self.model).bind_partial(self.model, *args).arguments
            inputs = {**dict(list(named.items())[1:]), **kwargs}
        return self._run(inputs) if self.change is None else self.change(self.model, self._run, inputs)


def wants_cache(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a forward reads a cache, or its caller may continue from the one that it returns (whole, padded rows).

    Without a ``use_cache`` input the model's config decides. In training and with labels the returned cache is not
    used, and encoders return none (BERT, whatever ``use_cache`` of its config says).
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
    # a forward may return a cache only if `config.is_decoder` is set
    is_decoder = bool(getattr(model.config, "is_decoder", False))
    return is_decoder or not any("is_decoder" in source_of(forward) for forward in forwards)


@weak_cache
def _takes_cache(forward: Any) -> bool:
    return takes_cache(inspect.signature(forward))


class _Replicate:
    """A model's ``_replicate_for_data_parallel``: each replica gets its own `ForwardWrapper`.

    ``nn.DataParallel``, which Trainer uses with several GPUs in one process, would copy the original's, which runs the
    original's weights. A ``forward`` of another library is still copied.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self) -> torch.nn.Module:
        """A replica, not yet with its parameters."""
        cls: Any = type(self.model)
        replica: torch.nn.Module = cls._replicate_for_data_parallel(self.model)
        wrapper: Any = self.model.forward
        if isinstance(wrapper, ForwardWrapper):
            replica.forward = wrapper.of(replica)
        return replica


def add_wrapper(patches: PatchSet, model: torch.nn.Module, change: Change) -> None:
    """Put a change around a model's ``forward``.

    If another library's ``forward`` wraps a `ForwardWrapper` that was undone, that one is used again.
    """
    before = vars(model).get("forward")
    unused: list[ForwardWrapper] = vars(model).pop(_UNUSED, [])
    if unused and before is not None:
        wrapper = unused.pop()
        wrapper.change = change
        if unused:
            vars(model)[_UNUSED] = unused
    else:
        wrapper = ForwardWrapper(model, change, before)
        patches.put_method(model, "forward", wrapper)
        if not isinstance(before, ForwardWrapper):
            patches.set_attribute(model, "_replicate_for_data_parallel", _Replicate(model))
    patches.add_undo(_undo_wrapper, model, wrapper)


def changes_around(model: torch.nn.Module) -> list[Any]:
    """The changes around a model's ``forward``, outermost first, up to a ``forward`` of another library."""
    found, wrapper = [], vars(model).get("forward")
    while isinstance(wrapper, ForwardWrapper):
        found.append(wrapper.change)
        wrapper = wrapper.inner
    return found


def _undo_wrapper(model: torch.nn.Module, wrapper: ForwardWrapper) -> None:
    """Undo `add_wrapper`; a ``forward`` that another library has put around the wrapper since still calls it."""
    wrapper.change = None
    if vars(model).get("forward", wrapper) is not wrapper:
        vars(model).setdefault(_UNUSED, []).append(wrapper)


class WholeModel(Protocol):
    """A change around a whole model."""

    def __call__(self, model: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
        """As for `Change`."""

    def missed(self, context: Context) -> str:
        """What goes wrong in a forward of the model without this change and without a cache, "" for nothing.

        Args:
            context: context of that forward.
        """


class OncePerCall:
    """A change around a whole model and every inner model, made once: in the outermost that is called."""

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
        """Forward pre-hook of the model's first attention module: require that it runs inside the change.

        Raises:
            UnsupportedAttentionError: a replaced ``forward`` does not call the wrapped one.
        """
        if torch.compiler.is_compiling() or self in slot().entered:
            return
        context = current()  # None for a layer called by itself or recomputed in a checkpoint
        caches = caches_of(kwargs)
        if module.training:  # by default the model makes an empty one, which is not used
            caches = [cache for cache in caches if cache_length(cache) > 0]
        missed = "" if context is None or caches else self.change.missed(context)
        if missed:
            text = "another library has replaced the model's forward with one that does not call the previous one"
            advice = (
                "Call axattn.apply (and axattn.sequence_parallel) on the model after whatever replaces its forward."
            )
            raise UnsupportedAttentionError(missed, [Reason("model", text)], advice)


def add_model_wrappers(patches: PatchSet, model: torch.nn.Module, change: WholeModel, *, at_head: bool) -> None:
    """Put a change around a whole model, whichever of its inner models is called.

    Args:
        patches: records the changes.
        model: a ``PreTrainedModel``.
        change: made once for each call of the model, or of an inner model.
        at_head: also wrap a ``forward`` of another library, which may define its inputs differently (TRL's fused
            head); else only the inner models are wrapped in that case.
    """
    from transformers import PreTrainedModel

    once = OncePerCall(change)
    models = [module for module in modules_of(model) if isinstance(module, PreTrainedModel)]
    for inner in models:
        replaced = inner is model and not packages_of(vars(inner).get("forward")) <= _CALL_ON
        if at_head or not replaced or len(models) == 1:
            add_wrapper(patches, inner, once)
    first = next((inner for inner in modules_of(text_model(model)) if calls_interface(type(inner))), None)
    if first is not None:
        patches.add_handle(first.register_forward_pre_hook(once.require_entered, with_kwargs=True))
