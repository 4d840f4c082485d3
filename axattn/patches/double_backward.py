"""Second derivatives (gradient penalties, Hessian-vector products): kernels that have none refuse them.

Torch does not, in two ways that change a result in silence. Under ``create_graph=True`` a kernel's own backward gives
gradients that nothing was recorded for; and the error of ``once_differentiable`` is never reached by
``torch.autograd.grad(..., inputs)``, because it stands on no path to the inputs (torch 2.13).
"""

from __future__ import annotations

import functools

import torch

from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.torch_internals import is_tracing


def require_first(out: torch.Tensor, kernel: str) -> None:
    """From here on a backward through `out`, the output of a kernel, raises where it is to be differentiated again.

    Nothing is done where no gradient is asked for, and inside compiled graphs, whose backward torch refuses to
    differentiate.
    """
    if out.requires_grad and not is_tracing():
        out.register_hook(functools.partial(_refuse, kernel))  # type: ignore[no-untyped-call]  # torch's has no types


def _refuse(kernel: str, grad: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        raise UnsupportedAttentionError(
            f"{kernel} can't serve a backward with create_graph=True",
            [
                Reason(
                    "second_gradient", f"its gradient can't be differentiated again ({kernel} has no second gradient)"
                )
            ],
            'Use attn_implementation="eager".',
        )


def require_first_of_module(kernel: str, module: torch.nn.Module, args: object, output: object) -> None:
    """Forward hook of an attention module whose kernel Transformers calls: `require_first` of what it gives."""
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, torch.Tensor):
        require_first(first, kernel)
