"""Differentiable collectives on ``torch.distributed``: exchange, sum, gather; for gloo and NCCL.

They are never traced: torch 2.11 loses the gradient of a traced sum (its all-reduce works in place).
"""

from __future__ import annotations

import math
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
def exchange_rows(x: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    """All-to-all of blocks of different sizes: the first `sent[0]` rows go to rank 0, the next `sent[1]` to rank 1, ...

    Args:
        x: ``[sum(sent), C]``.
        sent: rows for each rank of the group.
        received: rows from each rank.
        group: process group.

    Returns:
        ``[sum(received), C]``, by rank; its gradient goes the way back.
    """
    result: torch.Tensor = _ExchangeRows.apply(x, sent, received, group)  # type: ignore[no-untyped-call]
    return result


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        ctx.way = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        sent, received, group = ctx.way
        return exchange_rows(grad, received, sent, group), None, None, None


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
        group: a process group, or a ``DeviceMesh``: all of its dimensions.
    """
    groups = process_groups(group)
    ranks = math.prod(map(dist.get_world_size, groups))
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # this rank had no token for it (such as an expert); others may have
                parameter.grad = torch.zeros_like(parameter)
            for one in groups:
                dist.all_reduce(parameter.grad, group=one)
            parameter.grad /= ranks


def process_groups(group: Any) -> list[Any]:
    """The process groups of a process group or of a ``DeviceMesh``, one for each of its dimensions."""
    if not hasattr(group, "get_group"):
        return [group]
    return [group.get_group(dim) for dim in range(group.ndim)]
