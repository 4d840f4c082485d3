"""One graph of ``torch.compile`` for every batch."""

from __future__ import annotations

from typing import Any

import torch

from tests.conformance.cases import Case, Result, packed, padded
from tests.conformance.scenarios.base import DECODERS, LENGTHS, scenario


@scenario("compiled, fullgraph", DECODERS)
def compiled(case: Case) -> Any:
    """One graph for plain, padded and packed batches (traced, not lowered: the arithmetic stays PyTorch's)."""
    batches = {"plain": packed((12,), (12,)), "padded": padded(12, 7, side="left"), "packed": packed(LENGTHS)}
    with torch.no_grad():
        expected = {name: case.alone(batch) for name, batch in batches.items()}

    def found() -> Result:
        torch._dynamo.reset()
        model = torch.compile(case.candidate(), fullgraph=True, backend="eager")
        results = {}
        for name, batch in batches.items():
            inputs: dict[str, Any] = {"use_cache": False}
            if name != "plain":
                inputs["position_ids"] = case.positions(batch.positions)
            if name == "padded":
                inputs["attention_mask"] = batch.mask
            with torch.no_grad():
                results[name] = case.cut(batch, case.forward(model, batch.ids, **inputs))
        return results

    return expected, found
