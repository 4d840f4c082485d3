"""Packed and padded rows whose tokens are placed on two ranks: processes of their own, with gloo."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch

import axattn
from axattn.backends import by_document
from axattn.errors import AxattnError, Reason, UnsupportedAttentionError
from tests import distributed
from tests.conformance.cases import Batch, Case, Result, packed
from tests.conformance.families import FAMILIES
from tests.conformance.scenarios.base import PROJECTIONS, SELF, scenario
from tests.fakes.machine import hopper


def _weighted(out: torch.Tensor) -> torch.Tensor:
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum()


def _taken(model: Any, logits: torch.Tensor) -> Result:
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and any(part in name for part in PROJECTIONS):
            found[f"d {name}"] = parameter.grad.reshape(1, -1)
    return found


def on_a_rank(family: str, backend: str, folder: str, fakes: tuple[str, ...], batch: Batch) -> Result | list[Reason]:
    """In each process: logits and gradients of the candidate, or why it is refused."""
    import torch.distributed as dist

    case = Case(FAMILIES[family], backend, saved=folder)
    torch.set_num_threads(1)
    with hopper(*fakes) if fakes else contextlib.nullcontext(), mock.patch.dict(by_document.CALL, cpu=0, gpu=0):
        try:
            model = case.candidate().train()
            axattn.sequence_parallel(model, dist.group.WORLD, strategy="fetch", gather=True)
            inputs = {"attention_mask": batch.mask, "position_ids": case.positions(batch.positions)}
            logits = case.cut(batch, case.forward(model, batch.ids, **inputs, use_cache=False))
        except AxattnError as refusal:
            return list(refusal.reasons) or [Reason("model", str(refusal))]
        _weighted(logits).backward()
        axattn.parallel.average_gradients(model, dist.group.WORLD)
        return _taken(model, logits)


@scenario("two ranks, keys fetched, gradients", SELF, tolerance=2e-5)
def over_ranks(case: Case) -> Any:
    """A document longer than a rank's share is cut, others stay whole."""
    batch = packed((27, 5), (11, 9), pad=2)
    reference = case.reference().train()
    logits = case.alone(batch, reference)
    _weighted(logits).backward()

    def found() -> Result:
        from tests.conformance.cells import fakes_of

        asked = case.family.name, case.backend, case.folder(), fakes_of(case.backend)
        mine, _ = distributed.run(2, on_a_rank, *asked, batch)
        if isinstance(mine, list):
            raise UnsupportedAttentionError("refused over ranks", mine)
        result: Result = mine
        return result

    return _taken(reference, logits), found
