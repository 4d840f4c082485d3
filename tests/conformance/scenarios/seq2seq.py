"""Encoder-decoders."""

from __future__ import annotations

from typing import Any

import torch

from tests.conformance.cases import Case, Result, padded
from tests.conformance.scenarios.base import scenario
from tests.models import tokens

SEQ2SEQ = frozenset({"encoder-decoder"})


@scenario("cross-attention over a padded encoder", SEQ2SEQ)
def cross_attention(case: Case) -> Any:
    batch, answer = padded(12, 7, side="right"), tokens(2, 6, 3)

    def run(model: Any, rows: slice, width: int, **inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(batch.ids[rows, :width], decoder_input_ids=answer[rows], **inputs).logits

    model = case.reference()
    expected = torch.cat([run(model, slice(0, 1), 12), run(model, slice(1, 2), 7)])

    def found() -> Result:
        return {"logits": run(case.candidate(), slice(None), 12, attention_mask=batch.mask).flatten(0, 1)}

    return {"logits": expected.flatten(0, 1)}, found


@scenario("encoder-decoder gradients", SEQ2SEQ, tolerance=2e-5)
def seq2seq_gradients(case: Case) -> Any:
    batch, answer = padded(12, 7, side="right"), tokens(2, 6, 3)

    def run(model: Any, rows: slice, width: int, **inputs: Any) -> None:
        logits = model(batch.ids[rows, :width], decoder_input_ids=answer[rows], **inputs).logits
        logits.square().sum().backward()

    def taken(model: Any) -> Result:
        return {n: p.grad.reshape(1, -1) for n, p in model.named_parameters() if p.grad is not None}

    reference = case.reference().train()
    run(reference, slice(0, 1), 12)
    run(reference, slice(1, 2), 7)

    def found() -> Result:
        model = case.candidate().train()
        run(model, slice(None), 12, attention_mask=batch.mask)
        return taken(model)

    return taken(reference), found


@scenario("encoder-decoder generate", SEQ2SEQ)
def seq2seq_generate(case: Case) -> Any:
    batch = padded(12, 7, side="right")
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    model = case.reference()
    rows = [model.generate(batch.ids[r : r + 1, a:b], **greedy)[0] for r, a, b in batch.documents]

    def found() -> Result:
        return {"tokens": case.candidate().generate(batch.ids, attention_mask=batch.mask, **greedy).float()}

    return {"tokens": torch.stack(rows).float()}, found
