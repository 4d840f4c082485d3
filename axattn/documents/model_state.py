"""`ModelState`: the checks before a forward that depend on the state of a model and the process, not on its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from axattn.hf.foreign_code import changes_inputs
from axattn.hf.model_internals import CONFIG_NAME, wants_weights
from axattn.hf.registries import entries_of, name_of, require_registered
from axattn.hf.watched import Watched
from axattn.spec import names
from axattn.traits.attention_configs import NameCheck
from axattn.traits.model_traits import ModelTraits

SDPA = torch.nn.functional.scaled_dot_product_attention


class ModelState:
    """Checks the state of one model before its forward. As long as nothing of it changes, this is one comparison.

    Attributes:
        names: the check of the names that its attention modules read.
        inputs_may_change: unknown code runs between its input hook and its ``forward`` and may change its inputs
            (`axattn.documents.late_inputs`).
        tokens_suffice: a forward that is given only tokens and padding has nothing else to check.
    """

    def __init__(self, traits: ModelTraits) -> None:
        self.names = NameCheck()
        self.inputs_may_change = False
        self.tokens_suffice = False
        self._traits = traits
        self._watched: Watched | None = None

    def __reduce__(self) -> Any:
        return ModelState, (self._traits,)  # a copy of the model is another model

    def unchanged(self) -> bool:
        """Whether the last `require` holds. Not for graphs, which check by their guards."""
        return self._watched is not None and self._watched.unchanged()

    def require(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """Check the state and record it.

        Args:
            module: the model.
            hook: the forward pre-hook that checks.

        Raises:
            RegistrationError: the model runs on an axattn backend that is no longer registered.
            UnsupportedAttentionError: a layer reads another name and would misread the masks.
        """
        require_registered(module)
        self.names.require(module)
        if torch.compiler.is_compiling():
            return
        traits = self._traits
        name = name_of(module.config)
        self.inputs_may_change = changes_inputs(module, hook)
        self.tokens_suffice = (
            not self.inputs_may_change
            and traits.native is None
            and name in names.axattn_backends()
            and not (traits.reads or traits.picks or traits.shares_keys or traits.first_must_be_real)
            and torch.nn.functional.scaled_dot_product_attention is SDPA
            and not wants_weights(module.config)
        )
        attributes = vars(module.config)
        self._watched = Watched(
            (*self.names.whole, module._forward_pre_hooks),
            (
                *self.names.entries,
                *entries_of(name),
                *((attributes, attribute) for attribute in (CONFIG_NAME, "_output_attentions")),
                (vars(module), "forward"),
                (vars(torch.nn.functional), SDPA.__name__),
            ),
        )
