"""What a model's own code does with tokens, found by running it on a few of them. No answer is read in its source here.

It runs on a `Skeleton`, a copy of the model without layers and weights: six tokens, on the CPU. An answer is None where
that says nothing: the code wants a layer, a weight or an input that the skeleton has not.

These run when a model is put on a kernel, not in its forward; there only code without a source is asked about. Answers
are kept by what can change them: classes, their plain attributes, values of the config. Measured once, on one core of a
busy machine: 6 to 9 ms the first time for all three questions (BERT, RoBERTa, OPT, a Llama of 128 256 words), a third
of it for the loss, of which nobody asks but where rows are unpadded or split; from then on 1 ms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from axattn.errors import Reason
from axattn.hf.skeleton import Skeleton, Table
from axattn.hf.source_inspection import calls_interface
from axattn.hf.trial import PADDED, Tokens, question, run, takes

Pattern = Literal["first", "last", "first_real", "last_real", "every", "real", "other"]
"""Which tokens an output of one vector a row depends on: those at a place, whatever stands there, or real ones."""

_GIVEN = (3, 4, 5, 3, 4, 5)
"""The ``position_ids`` that are given: those of two documents."""
_PLACE = 3
"""The token of which is asked what it depends on."""


@dataclass(frozen=True, slots=True)
class Numbering:
    """How a model numbers its tokens.

    Attributes:
        read: ``position_ids`` reach all that reads positions; nothing else is known where they do not.
        first: the ``position_ids`` of a row's first token that give what the model does without any.
        padded: those of the real tokens of the row `ids`.
        ids: a row padded on the left.
        mask: its mask.
    """

    read: bool
    first: int = 0
    padded: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    mask: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Mixing:
    """Which tokens a model's outputs depend on, without its layers.

    Attributes:
        rows: each output that has one vector a row, by name.
        tokens: whether what is behind a token depends on other tokens; None where there is no such output.
        pooled: its ``pooler`` is called once, with whole rows and nothing else.
    """

    rows: tuple[tuple[str, Pattern], ...]
    tokens: bool | None
    pooled: bool


@dataclass(frozen=True, slots=True)
class Loss:
    """What a model compares logits with.

    Attributes:
        next: labels are shifted: each token's is that of the next; else it is its own.
        shifted: it takes ``shift_labels`` in their place.
        counted: it divides the sum by ``num_items_in_batch``.
    """

    next: bool
    shifted: bool
    counted: bool


def disagreement(model: Any, source: str, run: str) -> Reason:
    """Why rows of several sequences are refused: what a model does with them, its source and a run tell differently."""
    text = f"of {type(model).__name__} the source says that {source}, and a run of its code on a few tokens that {run}"
    return Reason("model", text)


# ---- positions -----------------------------------------------------------------------------------------------------


@question
def numbering(skeleton: Skeleton) -> Numbering | None:
    """Which positions reach the tables and the rotary embeddings of a model: without ``position_ids``, and with."""
    if not takes(skeleton, "position_ids"):
        return None
    tokens = Tokens(skeleton)
    ids, mask = tokens.ids[:2], tokens.mask[:2]
    given = {"input_ids": ids, "attention_mask": mask}
    readers = skeleton.readers()
    run(skeleton, **given)
    own = [[rows for seen in one if (rows := _rows(seen, ids)) and _counts(rows[0])] for one in readers]
    skeleton.forget()
    run(skeleton, **given, position_ids=torch.tensor([_GIVEN] * 2))
    found = set()
    for before, after in zip(own, readers, strict=True):
        told = [rows[0] for seen in after if (rows := _rows(seen, ids))]
        offsets = {row[0] - _GIVEN[0] for row in told if [at - row[0] for at in row] == [at - 3 for at in _GIVEN]}
        if before and len(offsets) != 1:
            return Numbering(False)
        for whole, padded in before:
            found.add(tuple(at - max(offsets) for at in (whole[0], *padded[PADDED:])))
    if len(found) != 1:
        return None
    first, *padded = found.pop()
    return Numbering(True, first, tuple(padded), tuple(ids[1].tolist()), tuple(mask[1].tolist()))


def _rows(seen: torch.Tensor, ids: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """What a reader was given for the first row and for the last, None where it is nothing for each token, or ids."""
    if not seen.ndim or seen.shape[-1] != ids.shape[-1] or torch.equal(seen, ids):
        return None
    rows = seen.reshape(-1, ids.shape[-1]).tolist()
    return rows[0], rows[-1]


def _counts(row: list[int]) -> bool:
    return row == list(range(row[0], row[0] + len(row)))


# ---- which tokens an output depends on -----------------------------------------------------------------------------


@question
def mixing(skeleton: Skeleton) -> Mixing | None:
    """Which tokens each output of a model depends on, found by gradients; and by a token that is masked (ESM)."""
    if any(calls_interface(type(module)) for module in skeleton.root.modules()):
        return None  # attention outside of a list of layers
    tokens = Tokens(skeleton)
    with _watch(skeleton) as (inner, handed):
        return _mixing(skeleton, tokens, inner, handed)


def _mixing(skeleton: Skeleton, tokens: Tokens, inner: list[torch.Tensor], handed: list[Any]) -> Mixing | None:
    output = run(skeleton, input_ids=tokens.ids, attention_mask=tokens.mask)
    every = [
        given
        for table in skeleton.tables()
        for seen, given in zip(table.seen, table.given, strict=True)
        if torch.equal(seen, tokens.ids)
    ]
    values = {name: x for name, x in output.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    values = {name: x for name, x in values.items() if x.shape[:1] == tokens.ids.shape[:1]}
    if not every or not values:
        return None
    each = {
        name: reached
        for name, x in values.items()
        if x.shape[:2] == tokens.ids.shape and (reached := _reached(x[0, _PLACE], every)) is not None
        if x.ndim > 2 or reached <= {(0, _PLACE)}
    }
    # from behind: models set the embeddings of padding to zero, and a pooler reads it all the same
    behind = [*(values[name] for name in each), *reversed(inner)]
    behind = [x for x in behind if x.shape[:2] == tokens.ids.shape and x.ndim > 2]
    rows = [(name, _pattern(x, [*([one] for one in behind), every])) for name, x in values.items() if name not in each]
    pooled = handed == [tokens.ids.shape]
    mixed = any(reached - {(0, _PLACE)} for reached in each.values()) if each else None
    if mixed is False:
        mixed = _counts_masked(skeleton, tokens, inner)
    return Mixing(tuple(rows), mixed, pooled)


@contextlib.contextmanager
def _watch(skeleton: Skeleton) -> Iterator[tuple[list[torch.Tensor], list[Any]]]:
    """Lists that fill while the copy runs: what embeddings and the models inside it give, and the shapes ``[B, S]`` of
    what its pooler gets (None if that is not one tensor)."""
    from transformers import PreTrainedModel

    inner: list[torch.Tensor] = []
    handed: list[Any] = []
    handles: list[Any] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        several = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        inner.extend(x for x in several if isinstance(x, torch.Tensor) and x.requires_grad)

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
        handed.append(args[0].shape[:2] if alone else None)

    for module in skeleton.root.modules():
        embeds = any(isinstance(child, Table) for child in module.children())
        if module is not skeleton.root and (embeds or isinstance(module, PreTrainedModel)):
            handles.append(module.register_forward_hook(keep))
    pooler = getattr(skeleton.root, "pooler", None)
    if isinstance(pooler, torch.nn.Module):
        handles.append(pooler.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield inner, handed
    finally:
        for handle in handles:
            handle.remove()


def _counts_masked(skeleton: Skeleton, tokens: Tokens, inner: list[torch.Tensor]) -> bool:
    """Whether one token is changed by another that is masked: what embeddings and inner models give, `inner`, is
    compared, for a norm behind them takes a scale away."""
    masked = getattr(skeleton.config.get_text_config(), "mask_token_id", None)
    if not isinstance(masked, int):
        return False
    ids, before = tokens.ids.clone(), list(inner)
    ids[0, 0] = masked
    inner.clear()
    run(skeleton, input_ids=ids, attention_mask=tokens.mask)
    pairs = [(a, b) for a, b in zip(before, inner, strict=True) if a.shape[:2] == tokens.ids.shape]
    return not all(torch.allclose(a[0, _PLACE], b[0, _PLACE]) for a, b in pairs)


def _reached(output: torch.Tensor, inputs: list[torch.Tensor]) -> set[tuple[int, int]] | None:
    """The tokens (row, place) of ``[B, S, D]`` inputs that an output depends on; None where it is made of none."""
    weights = torch.cos(torch.arange(output.numel(), dtype=torch.float32)).view(output.shape)
    found = torch.autograd.grad((output.float() * weights).sum(), inputs, retain_graph=True, allow_unused=True)
    gradients = [gradient for gradient in found if gradient is not None]
    if not gradients:
        return None
    return {(row, at) for one in gradients for row, at in (one != 0).any(-1).nonzero().tolist()}


_PLACES: dict[Pattern, tuple[range, range, range]] = {
    "first": (range(1),) * 3,
    "last": (range(5, 6),) * 3,
    "first_real": (range(1), range(2, 3), range(1)),
    "last_real": (range(5, 6), range(5, 6), range(3, 4)),
    "every": (range(6),) * 3,
    "real": (range(6), range(2, 6), range(4)),
}
"""Places in each of the rows."""


def _pattern(output: torch.Tensor, tries: list[list[torch.Tensor]]) -> Pattern:
    """The tokens that an output depends on, of the first inputs that it is made of."""
    reached = next((found for inputs in tries if (found := _reached(output, inputs)) is not None), None)
    for name, rows in _PLACES.items():
        if reached == {(row, at) for row, places in enumerate(rows) for at in places}:
            return name
    return "other"


# ---- loss ----------------------------------------------------------------------------------------------------------


@question
def loss(skeleton: Skeleton) -> Loss | None:
    """What the loss of a model is the cross-entropy of: its own logits, with labels that it shifts or not."""
    if not takes(skeleton, "labels"):
        return None
    ids = Tokens(skeleton).few
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    output = run(skeleton, **given)
    logits, found = output.logits.detach(), output.loss
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        return None
    nexts, owns = _entropy(logits[:, :-1], ids[:, 1:]), _entropy(logits, ids)
    shifts = _same(found, nexts)
    if shifts == _same(found, owns):  # it is another loss, or one can't tell
        return None
    total, targets = nexts * 2 if shifts else owns * 3, ids.roll(1, 1)
    extra = {"shift_labels": targets, "num_items_in_batch": 7}
    extra = {name: value for name, value in extra.items() if takes(skeleton, name)}
    found = run(skeleton, **given, **extra).loss if extra else found
    moved = _entropy(logits, targets)
    shifted = _same(found, moved) or _same(found, moved * 3 / 7)
    counted = _same(found, total / 7) or _same(found, moved * 3 / 7)
    return Loss(shifts, shifted, counted)


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def _same(a: Any, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and a.ndim == 0 and bool(torch.isclose(a.float(), b, rtol=1e-4, atol=1e-6))
