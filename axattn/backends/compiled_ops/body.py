"""What runs inside the operators of a compiled graph: a kernel's forward, and its backward.

A kernel with `ForwardBackward` saves its output and logsumexp between the two. Any other runs again in backward, under
autograd: whatever gradient the kernel has is then the operator's.
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
from axattn.backends.varlen_engine.forward_backward import ForwardBackward, Gradients, logsumexp_like
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
        options: the user's ``kernel_options`` as JSON; beside them ``deterministic``, of `axattn.hf.determinism`.
        rule: makes the dense mask, for padding with holes.
    """

    mask: LazyMask
    scale: float
    softcap: float | None
    kernel: str
    options: str
    rule: Callable[[], torch.Tensor]

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[B, S, H, Dv]``, and what `fake_output` says of a logsumexp.

        Raises:
            UnsupportedAttentionError: padding with holes, and a softcap or a kernel that nothing exact may stand in
                for.
        """
        call = self._call(query, key, value)
        forward_backward, layout = self._forward_backward(call), self.mask.layout()
        if forward_backward is None or layout is None:
            out, unused = self._run(call), _logsumexp(query, self.kernel)
            return out.contiguous(), unused
        out, logsumexp = forward_backward.forward(call, layout)
        return out.contiguous(), logsumexp.contiguous()

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        saved: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Gradients:
        """Gradients to query, key and value.

        Args:
            grad: of the output, ``[B, S, H, Dv]``.
            query: ``[B, H, S, D]``.
            key: ``[B, Hkv, S, D]``.
            value: ``[B, Hkv, S, Dv]``.
            saved: what `forward` returned, where the kernel has passes.
        """
        call = self._call(query, key, value)
        forward_backward, layout = self._forward_backward(call), self.mask.layout()
        if forward_backward is not None and layout is not None and saved is not None:
            dq, dk, dv = forward_backward.backward(grad, call, layout, *saved)
        else:
            with autograd_in_operator(), torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (query, key, value)]
                dq, dk, dv = torch.autograd.grad(self._run(self._call(*inputs)), inputs, grad)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    def _call(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionCall:
        causal = self.mask.pattern is None or self.mask.pattern.causal
        options = json.loads(self.options)
        extras: dict[str, object] = {"deterministic": True} if options.pop("deterministic", False) else {}
        call = AttentionCall(
            _NONE, query, key, value, self.mask, causal, None, self.scale, 0.0, self.softcap, None, None, extras
        )
        call.options = options
        return call

    def _forward_backward(self, call: AttentionCall) -> ForwardBackward | None:
        passes_of = backends.get(self.kernel).forward_backward
        return None if passes_of is None else passes_of(call)

    def _run(self, call: AttentionCall) -> torch.Tensor:
        if self.mask.layout() is None:  # padding with holes: no spans
            if self.softcap is not None or backends.get(self.kernel).variant is not None:
                raise UnsupportedAttentionError(
                    f"{self.kernel} can't serve this call",
                    [Reason("non_contiguous_padding", "holes (padding between real tokens)")],
                    "Run it without torch.compile.",
                )
            call.mask = self.rule()
            return sdpa.sdpa(call)
        return backends.get(self.kernel).called(call)


_NONE = torch.nn.Identity()  # in the place of the module: a kernel over spans does not look at it


# ---- the operators' forms, and what they keep ------------------------------------------------------------------------


def has_forward_backward(kernel: str) -> bool:
    """Whether an operator keeps a kernel's output and logsumexp for backward."""
    return backends.get(kernel).forward_backward is not None


def _logsumexp(query: torch.Tensor, kernel: str) -> torch.Tensor:
    return logsumexp_like(query) if has_forward_backward(kernel) else query.new_empty(0)


def fake_output(query: Any, key: Any, value: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The form of what the operators of attention return: ``[B, S, H, Dv]``, and ``[B, H, S]`` or nothing."""
    *_, kernel, _options = rest
    B, H, S, _D = query.shape
    return query.new_empty(B, S, H, value.shape[-1]), _logsumexp(query, kernel)


def fake_gradients(grad: Any, query: Any, key: Any, value: Any, *_: Any) -> Gradients:
    """The form of what their backward operators return."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    return dq, dk, dv


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor], tensors: int) -> None:
    """Save for backward the first `tensors` arguments of an operator, and its output where the kernel has passes."""
    ctx.rule = inputs[tensors:]
    *_, kernel, _options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:tensors], *(output if has_forward_backward(kernel) else (None, None)))
