"""The body of the operators of a compiled graph: a kernel's forward and its backward.

A kernel with `ForwardBackward` saves its output and logsumexp for backward. Any other runs its forward again in
backward, under autograd: the operator's gradient is the kernel's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from axattn import backends
from axattn.backends import sdpa
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine import sinks as sinks_of_kernel
from axattn.backends.varlen_engine.forward_backward import ForwardBackward, logsumexp_like
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.torch_internals import autograd_in_operator
from axattn.masks.lazy_mask import LazyMask


@dataclass(frozen=True, slots=True)
class OpBody:
    """One call of a backend inside an operator.

    Attributes:
        mask: of whole rows.
        scale: factor on the logits.
        softcap: see `axattn.spec.capability.Need`.
        kernel: the backend's name.
        options: the user's ``kernel_options`` as JSON, with ``deterministic`` of `axattn.hf.determinism`.
        dense_mask: makes the dense mask, for non-contiguous padding.
        sinks: ``[H]``, or None.
    """

    mask: LazyMask
    scale: float
    softcap: float | None
    kernel: str
    options: str
    dense_mask: Callable[[], torch.Tensor]
    sinks: torch.Tensor | None = None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[B, S, H, Dv]``, and a logsumexp of the shape that `fake_output` gives.

        Raises:
            UnsupportedAttentionError: non-contiguous padding, with a softcap or a kernel that no exact one may
                replace.
        """
        call = self._call(query, key, value, self.sinks)
        forward_backward, layout = self._forward_backward(call), self.mask.layout()
        if forward_backward is None or layout is None:
            out, unused = self._run(call), _logsumexp(query, self.kernel)
            return out.contiguous(), unused
        if call.sinks is None:
            out, logsumexp = forward_backward.forward(call, layout)
        else:
            out, logsumexp = sinks_of_kernel.forward(call, layout, forward_backward)
        return out.contiguous(), logsumexp.contiguous()

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        saved: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients to query, key, value and sinks (empty without sinks).

        Args:
            grad: gradient of the output, ``[B, S, H, Dv]``.
            query: ``[B, H, S, D]``.
            key: ``[B, Hkv, S, D]``.
            value: ``[B, Hkv, S, Dv]``.
            saved: what `forward` returned, if the kernel has a `ForwardBackward`.
        """
        call = self._call(query, key, value, self.sinks)
        forward_backward, layout = self._forward_backward(call), self.mask.layout()
        of_sinks = grad.new_empty(0)
        if forward_backward is None or layout is None or saved is None:
            given = (query, key, value, *(() if self.sinks is None else (self.sinks,)))
            with autograd_in_operator(), torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in given]
                dq, dk, dv, *rest = torch.autograd.grad(self._run(self._call(*inputs)), inputs, grad)
            of_sinks = rest[0] if rest else of_sinks
        elif call.sinks is None:
            dq, dk, dv = forward_backward.backward(grad, call, layout, *saved)
        else:
            (dq, dk, dv), of_sinks = sinks_of_kernel.backward(grad, call, layout, forward_backward, *saved)
        return dq.contiguous(), dk.contiguous(), dv.contiguous(), of_sinks.contiguous()

    def _call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> AttentionCall:
        causal = self.mask.pattern is None or self.mask.pattern.causal
        options = json.loads(self.options)
        extras: dict[str, object] = {"deterministic": True} if options.pop("deterministic", False) else {}
        call = AttentionCall(
            _NO_MODULE, query, key, value, self.mask, causal, None, self.scale, 0.0, self.softcap, sinks, None, extras
        )
        call.options = options
        return call

    def _forward_backward(self, call: AttentionCall) -> ForwardBackward | None:
        make = backends.get(self.kernel).forward_backward
        return None if make is None else make(call)

    def _run(self, call: AttentionCall) -> torch.Tensor:
        if self.mask.layout() is None:  # non-contiguous padding has no spans
            if self.softcap is not None or backends.get(self.kernel).variant is not None:
                raise UnsupportedAttentionError(
                    f"{self.kernel} can't serve this call",
                    [Reason("non_contiguous_padding", "padding between real tokens")],
                    "Run it without torch.compile.",
                )
            call.mask = self.dense_mask()
            return sdpa.sdpa(call)
        return backends.get(self.kernel).called(call)


_NO_MODULE = torch.nn.Identity()  # a kernel over spans does not read the module


# ---- fake outputs, and what is saved for backward --------------------------------------------------------------------


def has_forward_backward(kernel: str) -> bool:
    """Whether an operator saves a kernel's output and logsumexp for backward."""
    return backends.get(kernel).forward_backward is not None


def _logsumexp(query: torch.Tensor, kernel: str) -> torch.Tensor:
    return logsumexp_like(query) if has_forward_backward(kernel) else query.new_empty(0)


def fake_output(query: Any, key: Any, value: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Fake output of the attention operators: ``[B, S, H, Dv]``, and ``[B, H, S]`` or an empty tensor."""
    B, H, S, _D = query.shape
    return query.new_empty(B, S, H, value.shape[-1]), _logsumexp(query, _kernel(rest))


def fake_gradients(
    grad: Any, query: Any, key: Any, value: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fake output of their backward operators."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    sinks = rest[-1]
    return dq, dk, dv, torch.empty_like(sinks) if isinstance(sinks, torch.Tensor) else grad.new_empty(0)


def save_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor], tensors: int
) -> None:
    """Save the first `tensors` arguments of an operator, its sinks (the last argument), and its output if the kernel
    has a `ForwardBackward`."""
    ctx.settings, sinks = inputs[tensors:-1], inputs[-1]
    ctx.mark_non_differentiable(output[1])
    kept = output if has_forward_backward(_kernel(inputs)) else (None, None)
    ctx.save_for_backward(*inputs[:tensors], *kept, sinks)


def gradients(
    ctx: Any, grad: torch.Tensor, backward_op: Callable[..., tuple[torch.Tensor, ...]], arguments: int
) -> tuple[torch.Tensor | None, ...]:
    """The gradient of each of the operator's `arguments`, the last of which are its sinks."""
    *saved, sinks = ctx.saved_tensors
    dq, dk, dv, of_sinks = backward_op(grad, *saved, *ctx.settings, sinks)
    return dq, dk, dv, *(None,) * (arguments - 4), None if sinks is None else of_sinks


def _kernel(arguments: tuple[Any, ...]) -> str:
    """The kernel's name: the first string among an operator's arguments; the second is its options."""
    return next(one for one in arguments if isinstance(one, str))
