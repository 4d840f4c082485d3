"""One document a row, and packed rows: outputs against each document alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.conformance.cases import Batch, Case, Result, packed, padded
from tests.conformance.scenarios.base import DECODERS, LENGTHS, SELF, scenario
from tests.models import tokens


def _documents(case: Case, batch: Batch, **inputs: Any) -> tuple[Result, Callable[[], Result]]:
    """Outputs of a batch without gradients, against each document alone."""
    with torch.no_grad():
        expected = {"logits": case.alone(batch)}

    def found() -> Result:
        with torch.no_grad():
            return {"logits": case.cut(batch, case.forward(case.candidate(), batch.ids, **inputs))}

    return expected, found


@scenario("dense", SELF)
def dense(case: Case) -> Any:
    return _documents(case, packed((12,), (12,)))


@scenario("longer than window and chunk", SELF)
def long(case: Case) -> Any:
    return _documents(case, packed((70,)))


@scenario("right padding", SELF)
def right_padding(case: Case) -> Any:
    batch = padded(12, 7, side="right")
    return _documents(case, batch, attention_mask=batch.mask)


@scenario("left padding", DECODERS)
def left_padding(case: Case) -> Any:
    batch = padded(12, 7, side="left")
    where = {"position_ids": case.positions(batch.positions)}
    return _documents(case, batch, attention_mask=batch.mask, **where)


@scenario("padding on both sides and a hole", DECODERS)
def hole(case: Case) -> Any:
    """A row whose real tokens are not contiguous: eager with the same mask says what is right."""
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :2], mask[0, 9:], mask[1, 4:6] = 0, 0, 0
    real = mask.bool()

    def run(model: Any) -> Result:
        with torch.no_grad():
            return {"logits": case.forward(model, ids, attention_mask=mask)[real]}

    return run(case.reference()), lambda: run(case.candidate())


@scenario("holes, positions counted from the mask", DECODERS)
def counted_hole(case: Case) -> Any:
    """As ``generate`` counts positions of a prompt with padding in it: they go on after non-contiguous padding."""
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :2], mask[0, 9:], mask[1, 4:6], mask[1, 8:9] = 0, 0, 0, 0
    real = mask.bool()
    where = case.positions((mask.cumsum(-1) - 1).masked_fill(~real, 1))

    def run(model: Any) -> Result:
        with torch.no_grad():
            return {"logits": case.forward(model, ids, attention_mask=mask, position_ids=where)[real]}

    return run(case.reference()), lambda: run(case.candidate())


@scenario("packed, cache on by default", SELF)
def packed_default(case: Case) -> Any:
    batch = packed(LENGTHS)
    return _documents(case, batch, position_ids=case.positions(batch.positions))


@scenario("packed, cache off", DECODERS)
def packed_no_cache(case: Case) -> Any:
    batch = packed(LENGTHS)
    return _documents(case, batch, position_ids=case.positions(batch.positions), use_cache=False)


@scenario("packed, all-ones mask", SELF)
def packed_ones(case: Case) -> Any:
    batch = packed(LENGTHS)
    mask = torch.ones_like(batch.ids)
    return _documents(case, batch, position_ids=case.positions(batch.positions), attention_mask=mask)


@scenario("packed, cu_seq_lens", SELF, applies=lambda f: "" if f.lengths else "its forward takes no cu_seq_lens")
def packed_lengths(case: Case) -> Any:
    batch = packed(LENGTHS)
    edges = torch.tensor([0, 7, 18, 21], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 11, "max_length_k": 11}
    return _documents(case, batch, position_ids=case.positions(batch.positions), **lengths)


@scenario("packed, many rows", SELF)
def packed_rows(case: Case) -> Any:
    batch = packed(LENGTHS, (5, 16), (21,))
    return _documents(case, batch, position_ids=case.positions(batch.positions))


@scenario("packed, right padding", SELF)
def packed_padded(case: Case) -> Any:
    batch = packed(LENGTHS, (5, 9), pad=2)
    return _documents(case, batch, position_ids=case.positions(batch.positions), attention_mask=batch.mask)


@scenario("packed, document ids in the mask", SELF)
def packed_document_ids(case: Case) -> Any:
    """Nothing else says where a document ends; the last row is one document whose number is not 1."""
    batch = packed(LENGTHS, (5, 16), (21,))
    ids = torch.zeros_like(batch.ids)
    for number, (row, a, b) in zip((1, 2, 3, 1, 2, 2), batch.documents, strict=True):
        ids[row, a:b] = number
    return _documents(case, batch, attention_mask=ids)


@scenario("packed, documents not from position 0", SELF)
def packed_shifted(case: Case) -> Any:
    batch = packed(LENGTHS)
    shift = torch.tensor([3] * 7 + [20] * 11 + [1] * 3)[None]
    batch = Batch(batch.ids, batch.documents, batch.positions + shift)
    return _documents(case, batch, position_ids=case.positions(batch.positions))
