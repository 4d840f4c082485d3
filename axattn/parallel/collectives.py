"""Differentiable collectives on ``torch.distributed``: exchange, sum, gather; for gloo and NCCL.

They are never traced: torch 2.11 loses the gradient of a traced sum (its all-reduce works in place).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


@torch.compiler.disable  # type: ignore[untyped-decorator]
def exchange(x: torch.Tensor, group: Any) -> torch.Tensor:
    """All-to-all: block p of `x` goes to rank p and is replaced by rank p's block for this rank.

    Args:
        x: ``[P, ...]``.
        group: process group of P ranks.

    Returns:
        ``[P, ...]``; its gradient is exchanged in the same way.
    """
    result: torch.Tensor = _Exchange.apply(x, group)  # type: ignore[no-untyped-call]  # torch declares no types here
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return exchange(grad, ctx.group), None


def _all_to_all(x: torch.Tensor, group: Any) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def total(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of `x` over the ranks, on every rank.

    Its gradient is the sum of the ranks' gradients: with a loss that every rank holds, the *average* of the weights'
    gradients over the ranks (as DDP and FSDP compute it) is the gradient of that loss.
    """
    result: torch.Tensor = _Total.apply(x, group)  # type: ignore[no-untyped-call]  # torch declares no types here
    return result


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return total(grad.contiguous(), ctx.group), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gather(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """The ranks' tensors concatenated along `dim`, on every rank; gradients as for `total`."""
    result: torch.Tensor = _Gather.apply(x, dim, group)  # type: ignore[no-untyped-call]  # torch declares no types here
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        whole = total(grad.contiguous(), ctx.group)
        return whole.chunk(dist.get_world_size(ctx.group), ctx.dim)[dist.get_rank(ctx.group)], None, None


def average_gradients(model: torch.nn.Module, group: Any) -> None:
    """Average the gradients of a model over a group, for training loops without DDP and FSDP.

    Args:
        model: after its backward, the same weights on every rank.
        group: a process group or one-dimensional ``DeviceMesh``.
    """
    group = getattr(group, "get_group", lambda: group)()
    ranks = dist.get_world_size(group)
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # this rank had no token for it (such as an expert); others may have
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= ranks
