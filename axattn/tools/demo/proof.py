"""The proofs: changing a document changes no other, and a packed step equals the same documents run alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim with its measured error.

    Attributes:
        claim: a sentence.
        error: measured.
        limit: largest allowed error.
    """

    claim: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def _spans(batch: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(row, start, end) of every document of a batch that has a target."""
    rows, length = batch["input_ids"].shape
    ends = batch["cu_seq_lens_q"].tolist()
    found = [(a // length, a % length, a % length + b - a) for a, b in pairwise(ends)]
    return [(r, a, b) for r, a, b in found if r < rows and (batch["labels"][r, a:b] != -100).any()]


@torch.no_grad()
def no_leak(model: Any, batch: dict[str, Any]) -> Proof:
    """Change one document in the middle of the batch; compare the logits of all others (cache on, as by default)."""
    spans = _spans(batch)
    changed = spans[len(spans) // 2]
    row, start, end = changed
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][row, start:end] = (other["input_ids"][row, start:end] + 7) % model.config.vocab_size
    inputs = [{k: v for k, v in b.items() if k != "labels"} for b in (batch, other)]
    before, after = (model(**each, use_cache=True).logits for each in inputs)
    if torch.equal(before[row, start:end], after[row, start:end]):
        raise RuntimeError("the logits of the changed document did not change: the proof is void")
    error = max((before[r, a:b] - after[r, a:b]).abs().max().item() for r, a, b in spans if (r, a, b) != changed)
    return Proof(f"changing 1 of {len(spans)} documents leaves the logits of the others unchanged", error, 1e-5)


def packed_equals_alone(model: Any, reference: Any, batch: dict[str, Any]) -> list[Proof]:
    """Compare loss and gradients of a packed batch with its documents run alone on eager attention.

    Args:
        model: runs the packed batch.
        reference: the same weights on ``eager``.
        batch: from `PackingCollator`.
    """
    spans = _spans(batch)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    targets = int((batch["labels"] != -100).sum())
    reference.zero_grad()
    total = 0.0
    for row, start, end in spans:
        part = {key: batch[key][row : row + 1, start:end] for key in ("input_ids", "labels")}
        alone = reference(**part, use_cache=False, num_items_in_batch=targets).loss
        alone.backward()
        total += alone.item()
    pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    error = max(((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in pairs if q.grad is not None)
    model.zero_grad()
    return [
        Proof(
            "the loss of a packed step equals that of its documents run alone", abs(loss.item() - total) / total, 1e-5
        ),
        Proof("so do its gradients (largest relative error of any weight)", error, 1e-3),
    ]
