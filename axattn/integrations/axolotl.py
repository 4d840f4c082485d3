"""The axolotl plugin: the key ``axattn:`` of an axolotl config runs the model's attention through axattn.

axolotl finds it through the entry-point group ``axolotl.plugins`` and loads it with every config, so without the key it
changes nothing. The model loads on ``eager``, the only name that every model has and that axolotl does not patch, and
`axattn.apply` then switches it before LoRA is added; ``sdpa_varlen: false`` keeps packed batches' position ids and
stops axolotl from patching its SDPA path. Written against axolotl 0.21.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

_OFF = (None, False, 0, 1)
logger = logging.getLogger("axolotl.axattn")  # axolotl shows INFO of loggers under its own name only


class AxattnArgs(BaseModel):
    """Keys that the plugin adds to axolotl's config.

    Attributes:
        axattn: a name, ``auto`` or a hub path, as in `axattn.apply`; without it the plugin does nothing.
        axattn_on_unsupported: ``raise`` or ``route``.
        axattn_kernel_options: options of the kernel, by name.
        axattn_verify: False leaves out `axattn.VerifyCallback`, for a model whose modules can't run alone.
    """

    axattn: str | None = None
    axattn_on_unsupported: str | None = None
    axattn_kernel_options: dict[str, Any] | None = None
    axattn_verify: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        """Refuse what contradicts ``axattn:``, before axolotl acts on it, and set what axolotl needs.

        Raises:
            ValueError: names the keys; pydantic and axolotl report it with the config.
        """
        if not data.get("axattn"):
            options = [key for key in cls.model_fields if key.startswith("axattn_") and data.get(key)]
            if options:
                raise ValueError(f"{options[0]} is set without `axattn:`, which names the kernel")
            return data
        if data.get("attn_implementation") not in (None, "eager"):
            raise ValueError(
                f"`axattn: {data['axattn']}` and `attn_implementation: {data['attn_implementation']}` both name the "
                "attention. Remove one."
            )
        if data.get("sdpa_varlen"):
            raise ValueError("`sdpa_varlen` patches the attention that `axattn:` replaces. Remove one.")
        if data.get("context_parallel_size") not in _OFF:
            raise ValueError(
                "axattn can't run under context_parallel_size: axolotl gives each rank a part of every row and runs "
                "its own ring attention; axattn would attend within the part. Use context_parallel_size: 1, or "
                "axattn.sequence_parallel in a training script."
            )
        data["attn_implementation"], data["sdpa_varlen"] = "eager", False
        return data


class AxattnPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is optional: its class is untyped here
    """Applies axattn to the model before LoRA, and verifies it at the start of training."""

    def get_input_args(self) -> str:
        """The dotted name of the config's class."""
        return f"{AxattnArgs.__module__}.{AxattnArgs.__name__}"

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Run the built model's attention through the configured kernel.

        Raises:
            AxattnError: the kernel can't serve the model, or can't run here; with every reason.
        """
        if cfg.axattn:
            from axattn.loading import apply, status

            options = dict(cfg.axattn_kernel_options or {})
            apply(
                model, cfg.axattn, on_unsupported=cfg.axattn_on_unsupported or "raise", kernel_options=options or None
            )
            planned = Counter(layer.planned for layer in status(model).layers)
            shown = ", ".join(f"{name} runs {count} attention modules" for name, count in planned.items())
            logger.info("axattn: %s: %s", cfg.axattn, shown or "Transformers' function, with axattn's checks")

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """`axattn.VerifyCallback`, if an axattn kernel runs the model and ``axattn_verify`` is not False."""
        if not cfg.axattn or cfg.axattn_verify is False:
            return []
        from axattn.loading import status
        from axattn.tools.verify.callback import VerifyCallback

        return [VerifyCallback()] if status(trainer.model).layers else []
