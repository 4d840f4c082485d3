"""What a call may ask for: dropout, attention weights, autocast, masks of one's own, images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.conformance.cases import Case, Result, image_inputs, packed
from tests.conformance.scenarios.base import ALL, LENGTHS, SELF, scenario
from tests.models import positions, tokens


@scenario(
    "dropout", SELF, applies=lambda f: "" if f.dropout and f.kind != "vision" else "no attention dropout of its own"
)
def dropout(case: Case) -> Any:
    """Two seeds differ from each other and from no dropout; the same seed repeats."""
    ids = tokens(1, 12)
    one = torch.ones(1, 1)

    def found() -> Result:
        model = case.candidate(**{case.family.dropout: 0.5}).train()
        outs = []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            outs.append(case.forward(model, ids).detach())
        plain = case.forward(model.eval(), ids).detach()
        return {
            "differs by seed": one * float(not torch.equal(outs[0], outs[1])),
            "differs from none": one * float(not torch.equal(outs[0], plain)),
            "repeats": one * float(torch.equal(outs[0], outs[2])),
        }

    return {"differs by seed": one, "differs from none": one, "repeats": one}, found


@scenario("output_attentions", ALL)
def attentions(case: Case) -> Any:
    ids = tokens(1, 12)

    def run(model: Any) -> Result:
        extra = {"decoder_input_ids": ids.flip(-1)} if case.family.kind == "encoder-decoder" else {}
        with torch.no_grad():
            out = model(ids, output_attentions=True, **extra)
        given = out.encoder_attentions if extra else out.attentions
        weights = [a.flatten(0, -2) for a in given or ()]
        return {"logits": out[0][0], **{f"attention {i}": a for i, a in enumerate(weights)}}

    return run(case.reference()), lambda: run(case.candidate())


@scenario("bf16 autocast over fp32 weights", SELF, tolerance=6e-2)
def autocast(case: Case) -> Any:
    batch = packed(LENGTHS)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = {"logits": case.alone(batch).float()}

    def found() -> Result:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = case.forward(case.candidate(), batch.ids, position_ids=case.positions(batch.positions))
        return {"logits": case.cut(batch, out).float()}

    return expected, found


def _own_mask(case: Case, additive: bool) -> tuple[Result, Callable[[], Result]]:
    """A user's 4-D mask with holes, which replaces Transformers' own."""
    ids, where = tokens(2, 12), torch.arange(12).expand(2, 12)
    generator = torch.Generator().manual_seed(7)
    seen = torch.rand(2, 1, 12, 12, generator=generator) > 0.4
    seen = (seen | torch.eye(12, dtype=torch.bool)).tril()
    values = torch.randn(2, 1, 12, 12, generator=generator) if additive else torch.zeros(2, 1, 12, 12)
    values = values.masked_fill(~seen, torch.finfo(torch.float32).min)

    def run(model: Any, mask: torch.Tensor) -> Result:
        with torch.no_grad():
            out = case.forward(model, ids, attention_mask=mask, position_ids=case.positions(where))
            return {"logits": out.flatten(0, 1)}

    return run(case.reference(), values), lambda: run(case.candidate(), values if additive else seen)


@scenario("own 4-D bool mask", SELF)
def bool_mask(case: Case) -> Any:
    return _own_mask(case, additive=False)


@scenario("own 4-D float mask", SELF)
def float_mask(case: Case) -> Any:
    return _own_mask(case, additive=True)


@scenario("an image in the text", frozenset({"vision"}))
def image(case: Case) -> Any:
    """The vision tower, and (Gemma 3) image blocks that see each other both ways."""
    ids, inputs = image_inputs(case.family)

    def run(model: Any) -> Result:
        with torch.no_grad():
            return {"logits": model(ids, **inputs).logits[0]}

    return run(case.reference()), lambda: run(case.candidate())


@scenario("images in packed documents", frozenset({"vision"}))
def packed_images(case: Case) -> Any:
    """Text, an image in text, text: positions of one plane start anew in each document."""
    ids, inputs = image_inputs(case.family)
    before, after = (tokens(1, n, seed=n).clamp(max=80) for n in (5, 7))  # no image's tokens
    parts = [before, ids, after]
    kinds = {name: inputs[name] for name in ("token_type_ids", "mm_token_type_ids") if name in inputs}
    seen = {name: given for name, given in inputs.items() if name not in kinds}

    def around(given: torch.Tensor) -> torch.Tensor:
        return torch.cat([given if part is ids else torch.zeros_like(part) for part in parts], 1)

    model = case.reference()
    with torch.no_grad():
        alone = [
            model(part, **(inputs if part is ids else {k: torch.zeros_like(part) for k in kinds}), use_cache=False)
            for part in parts
        ]

    def found() -> Result:
        where = positions(tuple(part.shape[1] for part in parts))
        given = {name: around(kind) for name, kind in kinds.items()}
        with torch.no_grad():
            out = case.candidate()(torch.cat(parts, 1), position_ids=where, **given, **seen, use_cache=False)
        return {"logits": out.logits[0]}

    return {"logits": torch.cat([out.logits[0] for out in alone])}, found
