"""`VerifyCallback`: verifies the kernels of a model before the Trainer's first step."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from axattn.errors import AxattnError, Reason, UnsupportedAttentionError
from axattn.tools.verify.modules import verify_modules

logger = logging.getLogger("axattn")


class VerifyCallback(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Stops a run before step 1 if a kernel gives wrong, zero or non-finite outputs or gradients, or none can be run.

    Each kind of attention module runs alone on two packed documents (see `axattn.tools.verify.modules`), which takes
    seconds for any model size. Usage: ``Trainer(..., callbacks=[axattn.VerifyCallback()])``.

    Raises:
        UnsupportedAttentionError: a kernel is wrong, with the values and the place; or nothing could be verified.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Verify once, in the run's compute dtype."""
        import torch

        dtype = torch.bfloat16 if getattr(args, "bf16", False) else torch.float16 if args.fp16 else None
        checks = verify_modules(model, dtype)
        if all(check.outcome == "refused" for check in checks):
            refused = [Reason("verify", f"{check.scenario}: {check.detail}") for check in checks]
            nothing = Reason("verify", "no attention module runs on an axattn kernel that can run alone")
            raise UnsupportedAttentionError(
                "VerifyCallback can't verify anything in this model; training was not started",
                refused or [nothing],
                'Call axattn.apply(model, "auto") first, or remove VerifyCallback.',
            )
        wrong = [check for check in checks if check.outcome == "wrong"]
        if wrong:
            error: AxattnError = UnsupportedAttentionError(
                "the attention kernels of this model are wrong; training was not started",
                [
                    Reason("verify", f"{c.scenario}: {c.detail} (error {c.error:.2g}, budget {c.budget:.2g})")
                    for c in wrong
                ],
                'Use attn_implementation="auto", and report the output of `axattn verify` for this model.',
            )
            raise error
        for check in checks:
            shown = check.detail if check.error is None else f"{check.detail}, error {check.error:.2g}"
            logger.info("axattn: verified %s: %s (%s)", check.scenario, check.outcome, shown)
