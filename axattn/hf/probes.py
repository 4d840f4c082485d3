"""Probes: what a model's code does with tokens, found by running it. Source is not read here.

A probe runs a `Skeleton`, a copy of the model without layers and weights, on six tokens on the CPU. It returns None if
the code needs a layer, a weight or an input that the skeleton does not have.

Probes run when a model is switched to a backend, not in its forward (except for code without source). Answers are
cached by what can change them: classes, their simple attributes, config values. Measured on one core of a busy machine:
6 to 9 ms the first time for all three probes (BERT, RoBERTa, OPT, a Llama with a vocabulary of 128 256), a third of it
for the loss, which is needed only for unpadded or split rows; later 1 ms.
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
"""Which tokens an output with one vector per row depends on: those at a fixed position, or real tokens."""

_GIVEN = (3, 4, 5, 3, 4, 5)
"""The ``position_ids`` passed to the model: those of two documents."""
_PLACE = 3
"""The token whose dependencies are examined."""


@dataclass(frozen=True, slots=True)
class PositionCounting:
    """How a model counts its position ids.

    Attributes:
        read: whether ``position_ids`` reach every module that reads positions; if not, the other fields are unknown.
        first: the position id of a row's first token that reproduces the model's own position ids.
        padded: the position ids of the real tokens of the row `ids`.
        ids: a left-padded row.
        mask: its mask.
    """

    read: bool
    first: int = 0
    padded: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    mask: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenMixing:
    """Which tokens a model's outputs depend on, without its layers.

    Attributes:
        rows: the outputs with one vector per row, by name.
        tokens: whether the output of a token depends on other tokens; None if there is no such output.
        pooled: whether its ``pooler`` is called once, with whole rows as the only argument.
    """

    rows: tuple[tuple[str, Pattern], ...]
    tokens: bool | None
    pooled: bool


@dataclass(frozen=True, slots=True)
class Loss:
    """What a model's loss compares logits with.

    Attributes:
        next: it shifts labels (the target is the next token's label); else the target is the token's own label.
        shifted: it uses ``shift_labels`` instead, if given.
        counted: it divides the sum by ``num_items_in_batch``.
    """

    next: bool
    shifted: bool
    counted: bool


def disagreement(model: Any, source: str, run: str) -> Reason:
    """The reason to refuse packed rows if a model's source and a run of its code disagree."""
    text = f"of {type(model).__name__} the source says that {source}, and a run of its code on a few tokens that {run}"
    return Reason("model", text)


# ---- positions -----------------------------------------------------------------------------------------------------


@question
def position_counting(skeleton: Skeleton) -> PositionCounting | None:
    """Which positions reach the tables and rotary embeddings of a model, without ``position_ids`` and with them."""
    if not takes(skeleton, "position_ids"):
        return None
    tokens = Tokens(skeleton)
    ids, mask = tokens.ids[:2], tokens.mask[:2]
    given = {"input_ids": ids, "attention_mask": mask}
    readers = skeleton.readers()
    run(skeleton, **given)
    own = [[rows for seen in one if (rows := _rows(seen, ids)) and _is_consecutive(rows[0])] for one in readers]
    skeleton.forget()
    run(skeleton, **given, position_ids=torch.tensor([_GIVEN] * 2))
    found = set()
    for before, after in zip(own, readers, strict=True):
        first_rows = [rows[0] for seen in after if (rows := _rows(seen, ids))]
        offsets = {row[0] - _GIVEN[0] for row in first_rows if [at - row[0] for at in row] == [at - 3 for at in _GIVEN]}
        if before and len(offsets) != 1:
            return PositionCounting(False)
        for whole, padded in before:
            found.add(tuple(at - max(offsets) for at in (whole[0], *padded[PADDED:])))
    if len(found) != 1:
        return None
    first, *padded = found.pop()
    return PositionCounting(True, first, tuple(padded), tuple(ids[1].tolist()), tuple(mask[1].tolist()))


def _rows(seen: torch.Tensor, ids: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """The input of a reader for the first and the last row; None if it has no value per token, or is the token ids."""
    if not seen.ndim or seen.shape[-1] != ids.shape[-1] or torch.equal(seen, ids):
        return None
    rows = seen.reshape(-1, ids.shape[-1]).tolist()
    return rows[0], rows[-1]


def _is_consecutive(row: list[int]) -> bool:
    return row == list(range(row[0], row[0] + len(row)))


# ---- which tokens an output depends on -----------------------------------------------------------------------------


@question
def token_mixing(skeleton: Skeleton) -> TokenMixing | None:
    """Which tokens each output of a model depends on, found by gradients and by a masked token (ESM)."""
    if any(calls_interface(type(module)) for module in skeleton.root.modules()):
        return None  # it has attention outside of its lists of layers
    tokens = Tokens(skeleton)
    with _watch(skeleton) as (inner, pooler_shapes):
        return _token_mixing(skeleton, tokens, inner, pooler_shapes)


def _token_mixing(
    skeleton: Skeleton, tokens: Tokens, inner: list[torch.Tensor], pooler_shapes: list[Any]
) -> TokenMixing | None:
    output = run(skeleton, input_ids=tokens.ids, attention_mask=tokens.mask)
    every = [
        given
        for table in skeleton.tables()
        for seen, given in zip(table.inputs, table.outputs, strict=True)
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
    # latest first: models zero the embeddings of padding, and a pooler reads padding all the same
    hidden = [*(values[name] for name in each), *reversed(inner)]
    hidden = [x for x in hidden if x.shape[:2] == tokens.ids.shape and x.ndim > 2]
    rows = [(name, _pattern(x, [*([one] for one in hidden), every])) for name, x in values.items() if name not in each]
    pooled = pooler_shapes == [tokens.ids.shape]
    mixed = any(reached - {(0, _PLACE)} for reached in each.values()) if each else None
    if mixed is False:
        mixed = _counts_masked(skeleton, tokens, inner)
    return TokenMixing(tuple(rows), mixed, pooled)


@contextlib.contextmanager
def _watch(skeleton: Skeleton) -> Iterator[tuple[list[torch.Tensor], list[Any]]]:
    """Lists that fill while the skeleton runs: the outputs of embeddings and inner models, and the shapes ``[B, S]`` of
    the pooler's input (None if that is not a single tensor)."""
    from transformers import PreTrainedModel

    inner: list[torch.Tensor] = []
    pooler_shapes: list[Any] = []
    handles: list[Any] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        several = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        inner.extend(x for x in several if isinstance(x, torch.Tensor) and x.requires_grad)

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        single = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
        pooler_shapes.append(args[0].shape[:2] if single else None)

    for module in skeleton.root.modules():
        embeds = any(isinstance(child, Table) for child in module.children())
        if module is not skeleton.root and (embeds or isinstance(module, PreTrainedModel)):
            handles.append(module.register_forward_hook(keep))
    pooler = getattr(skeleton.root, "pooler", None)
    if isinstance(pooler, torch.nn.Module):
        handles.append(pooler.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield inner, pooler_shapes
    finally:
        for handle in handles:
            handle.remove()


def _counts_masked(skeleton: Skeleton, tokens: Tokens, inner: list[torch.Tensor]) -> bool:
    """Whether masking one token changes another. Compares `inner`, the outputs of embeddings and inner models, because
    a later norm would remove a scale."""
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
    """The tokens (row, position) of ``[B, S, D]`` inputs that an output depends on; None if it uses no input."""
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
"""Positions in each of the rows."""


def _pattern(output: torch.Tensor, tries: list[list[torch.Tensor]]) -> Pattern:
    """The tokens that an output depends on, in the first inputs that it uses."""
    reached = next((found for inputs in tries if (found := _reached(output, inputs)) is not None), None)
    for name, rows in _PLACES.items():
        if reached == {(row, at) for row, places in enumerate(rows) for at in places}:
            return name
    return "other"


# ---- loss ----------------------------------------------------------------------------------------------------------


@question
def loss(skeleton: Skeleton) -> Loss | None:
    """Which targets the cross-entropy of a model uses: labels that it shifts or not."""
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
    if shifts == _same(found, owns):  # another loss, or ambiguous
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
