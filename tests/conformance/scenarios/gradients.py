"""Gradients of packed and padded rows, with and without checkpointing, and the leak test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from axattn.unpadding.shared_prefixes import SharePrefixes
from tests.conformance.cases import Batch, Case, Result, packed, padded
from tests.conformance.scenarios.base import DECODERS, LENGTHS, PROJECTIONS, SELF, scenario
from tests.models import tokens


def _gradients(
    case: Case, batch: Batch, checkpointing: bool | None = None, share_prefixes: bool = False
) -> tuple[Result, Callable[[], Result]]:
    """Gradients of the inputs and of the projections, and the logits, against the sum over the documents alone."""
    width: dict[str, torch.Tensor] = {}

    def weight(out: torch.Tensor) -> torch.Tensor:
        if "target" not in width:
            width["target"] = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        return (out * width["target"]).sum()

    def taken(model: Any, logits: torch.Tensor) -> Result:
        found = {"logits": logits.detach()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and any(part in name for part in PROJECTIONS):
                found[f"d {name}"] = parameter.grad.reshape(1, -1)
        return found

    reference = case.reference().train()
    logits = case.alone(batch, reference)
    weight(logits).backward()

    def found() -> Result:
        model = (case.candidate(True) if share_prefixes else case.candidate()).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        inputs = {"attention_mask": batch.mask, "position_ids": case.positions(batch.positions)}
        if share_prefixes:
            inputs["use_cache"] = False
        ran = SharePrefixes._run
        with mock.patch.object(SharePrefixes, "_run", autospec=True, side_effect=ran) as shared:
            logits = case.cut(batch, case.forward(model, batch.ids, **inputs))
        assert bool(shared.call_count) == share_prefixes
        weight(logits).backward()
        return taken(model, logits)

    return taken(reference, logits), found


@scenario("gradients, right padding", SELF, tolerance=2e-5)
def padded_gradients(case: Case) -> Any:
    return _gradients(case, padded(12, 7, side="right"))


@scenario("packed gradients", SELF, tolerance=2e-5)
def gradients(case: Case) -> Any:
    return _gradients(case, packed(LENGTHS, (5, 9), pad=2))


@scenario("packed gradients, reentrant checkpointing", SELF, tolerance=2e-5)
def reentrant(case: Case) -> Any:
    return _gradients(case, packed(LENGTHS, (5, 9), pad=2), True)


@scenario("packed gradients, checkpointing", SELF, tolerance=2e-5)
def not_reentrant(case: Case) -> Any:
    return _gradients(case, packed(LENGTHS, (5, 9), pad=2), False)


@scenario("shared prefixes, gradients", DECODERS, tolerance=2e-5)
def shared_prefixes(case: Case) -> Any:
    """Two completions of a prompt and a document that begins with half of it, packed and padded."""
    batch = packed((27, 23), (31,), pad=2)
    prompt = tokens(1, 40, 7)[0]
    for (row, a, _), common in zip(batch.documents, (20, 20, 17), strict=True):
        batch.ids[row, a : a + common] = prompt[:common]
    return _gradients(case, batch, share_prefixes=True)


@scenario("no leak between documents", SELF)
def leak(case: Case) -> Any:
    """Another token in the second document: outputs and input gradients of the others stay, bit for bit."""
    batch = packed(LENGTHS)
    changed = batch.ids.clone()
    changed[0, 9] = 3 + (changed[0, 9] - 2) % 94
    others = torch.tensor([True] * 7 + [False] * 11 + [True] * 3)

    def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        out = model(inputs_embeds=embeds, position_ids=case.positions(batch.positions))[0][0]
        (grad,) = torch.autograd.grad(out[others].square().sum(), embeds)
        return out.detach(), grad[0]

    zero = torch.zeros(1, 1)
    expected = {"outputs": zero, "gradients": zero, "gradient to the other document": zero, "changed": zero + 1}

    def found() -> Result:
        model = case.candidate()
        (out, grad), (out2, grad2) = run(model, batch.ids), run(model, changed)
        exact = 1e-6 if case.family.experts else 0.0

        def differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            worst = ((a - b).abs().max() / a.abs().max()).item()
            return zero + (worst if worst > exact else 0.0)

        return {
            "outputs": differs(out[others], out2[others]),
            "gradients": differs(grad[others], grad2[others]),
            "gradient to the other document": zero + grad[~others].abs().max().item(),
            "changed": zero + float(not torch.equal(out[~others], out2[~others])),
        }

    return expected, found
