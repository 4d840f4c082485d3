"""The scenarios for whole models. A scenario returns tensors by name. The reference runs each packed document alone,
and padded rows as they are, because effects of padding outside of attention (BART's positions along the row,
MobileBERT's trigrams) are not due to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from axattn.hf.caches import caches_in
from axattn.hf.forward_inputs import cache_keyword
from axattn.traits.position_ids import first_position

Result = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Rows of documents.

    Attributes:
        ids: int64 ``[B, S]``.
        documents: ``(row, start, end)`` of each.
        positions: int64 ``[B, S]``.
        mask: int64 ``[B, S]``, 1 for a real token.
    """

    ids: torch.Tensor
    documents: tuple[tuple[int, int, int], ...]
    positions: torch.Tensor
    mask: torch.Tensor


def batch(ids: torch.Tensor, *rows: tuple[tuple[int, int], ...]) -> Batch:
    """A `Batch` from the ``(start, end)`` of the documents in each row; other tokens are padding."""
    positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    documents = []
    for row, spans in enumerate(rows):
        for start, end in spans:
            positions[row, start:end] = torch.arange(end - start, device=ids.device)
            mask[row, start:end] = 1
            documents.append((row, start, end))
    return Batch(ids, tuple(documents), positions, mask)


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        model: the model.
        decoder: whether it decodes with a cache.
    """

    model: Any
    decoder: bool

    def positions(self, given: Batch) -> torch.Tensor:
        """int64 ``[B, S]``: the position ids of a batch, as this model counts them."""
        first = first_position(self.model)
        return given.positions if not first else (given.positions + first).masked_fill(given.mask == 0, first - 1)

    def run(self, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Logits or last hidden states ``[B, S, V]``, float32."""
        out: torch.Tensor = self.model(ids, **inputs)[0]
        return out.float()

    def alone(self, given: Batch) -> torch.Tensor:
        """Outputs of the documents run one by one, concatenated: ``[tokens, V]``."""
        off = {"use_cache": False} if self.decoder else {}
        parts = [self.run(given.ids[row : row + 1, a:b], **off)[0] for row, a, b in given.documents]
        return torch.cat(parts)

    def together(self, given: Batch, **inputs: Any) -> torch.Tensor:
        """Outputs of the batch run at once, its documents concatenated: ``[tokens, V]``."""
        out = self.run(given.ids, **inputs)
        return torch.cat([out[row, a:b] for row, a, b in given.documents])


Scenario = Callable[[Subject, Callable[[int, int], torch.Tensor], int, bool], Result]
"""``(subject, draw(rows, length) → ids, length, reference) → tensors``; the reference runs documents one by one."""
SCENARIOS: dict[str, Scenario] = {}
DECODERS_ONLY: set[str] = set()


def _scenario(name: str, decoders_only: bool = False) -> Callable[[Scenario], Scenario]:
    def add(function: Scenario) -> Scenario:
        SCENARIOS[name] = function
        if decoders_only:
            DECODERS_ONLY.add(name)
        return function

    return add


@_scenario("dense")
def _dense(subject: Subject, draw: Any, length: int, reference: bool) -> Result:
    return {"output": subject.alone(batch(draw(1, length), ((0, length),)))}


LONG = "longer than the window"


@_scenario(LONG)
def _long(subject: Subject, draw: Any, length: int, reference: bool) -> Result:
    return _dense(subject, draw, length, reference)


def _padded(side: str) -> Scenario:
    def run(subject: Subject, draw: Any, length: int, reference: bool) -> Result:
        short = max(1, length * 2 // 3)
        span = (0, short) if side == "right" else (length - short, length)
        given = batch(draw(2, length), ((0, length),), (span,))
        where = {"position_ids": subject.positions(given)} if subject.decoder else {}
        off = {"use_cache": False} if subject.decoder else {}
        return {"output": subject.together(given, attention_mask=given.mask, **where, **off)}

    return run


_scenario("right padding")(_padded("right"))
_scenario("left padding", decoders_only=True)(_padded("left"))


def _packed(rows: int, **inputs: Any) -> Scenario:
    def run(subject: Subject, draw: Any, length: int, reference: bool) -> Result:
        given = _documents(draw(rows, length), rows, length)
        if reference:
            return {"output": subject.alone(given)}
        return {"output": subject.together(given, position_ids=subject.positions(given), **inputs)}

    return run


def _documents(ids: torch.Tensor, rows: int, length: int) -> Batch:
    a, b = length // 3, length * 3 // 4
    splits = [((0, a), (a, b), (b, length)), ((0, b), (b, length))]
    return batch(ids, *(splits[row % 2] for row in range(rows)))


_scenario("packed, one row")(_packed(1))
_scenario("packed, many rows")(_packed(2))


@_scenario("packed, all-ones mask", decoders_only=True)
def _all_ones(subject: Subject, draw: Any, length: int, reference: bool) -> Result:
    given = _documents(draw(1, length), 1, length)
    if reference:
        return {"output": subject.alone(given)}
    return {"output": subject.together(given, position_ids=subject.positions(given), attention_mask=given.mask)}


@_scenario("no leak")
def _leak(subject: Subject, draw: Any, length: int, reference: bool) -> Result:
    """Outputs of the other documents before and after a token of the second document changes."""
    given = _documents(draw(1, length), 1, length)
    other = given.ids.clone()
    at = length // 2
    other[0, at] = given.ids[0, at - 1] if given.ids[0, at - 1] != given.ids[0, at] else given.ids[0, 0]
    ids = given.ids if reference else other
    out = subject.run(ids, position_ids=subject.positions(given))[0]
    (_, a, b), (_, c, d) = given.documents[0], given.documents[2]
    return {"others": torch.cat([out[a:b], out[c:d]])}


@_scenario("decoding", decoders_only=True)
def _decode(subject: Subject, draw: Any, length: int, reference: bool) -> Result:
    """Decode four tokens with a cache, against the whole row at once."""
    ids = draw(2, length)
    if reference:
        return {"output": subject.run(ids, use_cache=False)[:, -4:].flatten(0, 1)}
    out = subject.model(ids[:, : length - 4], use_cache=True)
    keyword = cache_keyword(subject.model)
    steps = []
    for at in range(length - 4, length):
        out = subject.model(ids[:, at : at + 1], use_cache=True, **{keyword: next(caches_in(out))})
        steps.append(out[0][:, -1].float())
    return {"output": torch.stack(steps, 1).flatten(0, 1)}


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "Wqkv", "out_proj", "query", "key", "value")


@_scenario("gradients, packed")
def _gradients(subject: Subject, draw: Any, length: int, reference: bool) -> Result:
    given = _documents(draw(1, length), 1, length)
    subject.model.zero_grad(set_to_none=True)
    out = subject.alone(given) if reference else subject.together(given, position_ids=subject.positions(given))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    torch.autograd.backward((out * weight).sum())
    found = {"output": out.detach()}
    for name, parameter in subject.model.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in PROJECTIONS):
            grad = parameter.grad
            found[f"gradient of {name}"] = torch.zeros(0) if grad is None else grad.detach().float().reshape(1, -1)
    subject.model.zero_grad(set_to_none=True)
    return found
