"""Patch: Transformers' continuous batching (``generate_batch``, TRL's GRPO with it) on a model whose kernel is ours.

It accepts eager, sdpa and flash names only, whose attention functions read its paged cache, and it switches models to
flash names by itself. So a model of ours runs its steps on such a name while a manager lasts, and on ours again after.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn import backends
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.model_internals import CONFIG_NAME, supports
from axattn.patches.patchset import PatchSet
from axattn.planning.plan import Plan
from axattn.spec import names
from axattn.spec.capability import missing
from axattn.traits.attention_configs import copies
from axattn.traits.layer_needs import sub_configs

METHOD = "init_continuous_batching"
"""The method of models by which everything that batches continuously gets its manager (Transformers 5.17 to 5.24)."""
_PAGED_EAGER = "paged|eager"


class _Start:
    """A model's ``init_continuous_batching``. Picklable and copyable with its model.

    Args:
        model: the model.
        by_sdpa: Transformers' sdpa can serve all of its layers.
        softcap: a layer caps its logits, which Transformers' paged eager attention does not.
    """

    def __init__(self, model: torch.nn.Module, *, by_sdpa: bool, softcap: bool) -> None:
        self.model = model
        self.by_sdpa = by_sdpa
        self.softcap = softcap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own method.

        Raises:
            UnsupportedAttentionError: no name that Transformers batches continuously computes what the model asks for.
        """
        model: Any = self.model
        configs = {id(config): config for _, config in sub_configs(model.config)}
        configs |= {id(copy.config): copy.config for copy in copies(model)}
        before = [(config, getattr(config, CONFIG_NAME, None)) for config in configs.values()]
        for config, name in before:
            if name in names.axattn_backends():
                setattr(config, CONFIG_NAME, "sdpa" if self.by_sdpa else "eager")
        try:
            manager = getattr(type(model), METHOD)(model, *args, **kwargs)
            self._require_softcap()
        except BaseException:
            _put(before)
            raise
        manager.stop = _Stop(manager, self, before)
        return manager

    def _require_softcap(self) -> None:
        model: Any = self.model
        if self.softcap and getattr(model.config.get_text_config(), CONFIG_NAME, None) == _PAGED_EAGER:
            raise UnsupportedAttentionError(
                f"continuous batching can't serve {type(model).__name__}",
                [
                    Reason(
                        "softcap", "Transformers' paged eager attention drops the softcap of its layers, sdpa has none"
                    )
                ],
                "Install flash-attn, to which it then switches, or use model.generate, which runs on any kernel.",
            )


class _Stop:
    """A manager's ``stop``, after which the model runs on the names that it had before."""

    def __init__(self, manager: Any, start: _Start, before: list[tuple[Any, Any]]) -> None:
        self.manager = manager
        self.start = start
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the manager's own method."""
        try:
            return type(self.manager).stop(self.manager, *args, **kwargs)
        finally:
            if vars(self.start.model).get(METHOD) is self.start:  # not put on another kernel since
                _put(self.before)


def _put(names: list[tuple[Any, Any]]) -> None:
    for config, name in names:
        setattr(config, CONFIG_NAME, name)


def add_paged_steps(patches: PatchSet, model: torch.nn.Module, plan: Plan) -> None:
    """Let a model batch continuously, whatever name it runs on."""
    if not hasattr(type(model), METHOD):
        return
    sdpa = backends.get("sdpa").capability
    needs = [entry.layer.need for entry in plan.layers]
    by_sdpa = supports(type(model), "sdpa") and not any(missing(need, sdpa) for need in needs)
    softcap = any(need.softcap for need in needs)
    patches.set_attribute(model, METHOD, _Start(model, by_sdpa=by_sdpa, softcap=softcap))
