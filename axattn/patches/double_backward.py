"""Second derivatives (gradient penalties, Hessian-vector products): refused for kernels without one.

Torch does not refuse them, and gives wrong results in two ways (torch 2.13). Under ``create_graph=True`` a kernel's own
backward returns gradients without a graph; and ``torch.autograd.grad(..., inputs)`` never reaches the error of
``once_differentiable``, which is on no path to the inputs.
"""

from __future__ import annotations

import functools

import torch

from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.torch_internals import is_tracing


def refuse_second_gradient(out: torch.Tensor, kernel: str) -> None:
    """Make a backward with ``create_graph=True`` through `out`, the output of a kernel, raise.

    Does nothing if `out` needs no gradient, and inside compiled graphs, whose backward torch refuses to differentiate.
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


def refuse_second_gradient_of_module(kernel: str, module: torch.nn.Module, args: object, output: object) -> None:
    """Forward hook of an attention module whose kernel Transformers calls: `refuse_second_gradient` for its output."""
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, torch.Tensor):
        refuse_second_gradient(first, kernel)
