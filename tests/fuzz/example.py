"""`Example`: one random case of plain values, so that its ``repr`` is a script; and the tensors that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch

from axattn import PackingCollator

Description = Literal[
    "nothing",
    "positions",
    "positions and mask",
    "document ids",
    "document ids and positions",
    "lengths",
    "index",
    "index and mask",
    "collator",
]
"""How documents are described: by position_ids, by a mask of document ids, by cu_seq_lens, by seq_idx, or by what
`axattn.PackingCollator` makes of them."""
Giver = Literal["caller", "hook", "inner hook", "inner forward"]
"""Who adds the description of the documents: the caller, or a user's own code on the model or on the one inside it."""
CacheUse = Literal["default", "off", "empty", "reset", "cropped"]
Training = Literal["no", "plain", "checkpointing", "reentrant checkpointing"]
Number = Literal["float32", "float64", "bfloat16", "autocast"]
Step = Literal["apply again", "restore and apply", "using", "deepcopy", "pickle"]
Row = tuple[tuple[int, int], ...]
"""Documents of a row: (padding in front, tokens)."""


FIRST = {"roberta": 2}
"""Where families count positions from, if not from 0: the one before is that of padding, and refused."""


@dataclass(frozen=True)
class Example:
    """What is drawn.

    Attributes:
        family: one of `tests.fuzz.families.FAMILIES`.
        name: attention implementation under test.
        rows: of each row, its documents as (padding before it, tokens of it); rows end in padding up to the longest.
        described_by: how the documents are described.
        giver: who adds that description.
        starts: the first position of documents, in turn, where positions are given.
        hole: leave out a token in the middle of each document of five or more, with positions that go on after it.
        mask: dtype of the mask.
        positions: dtype of the positions.
        strided: inputs are views with strides of their own.
        embeds: ``inputs_embeds`` in the place of ``input_ids``.
        lengths: `PackingCollator` gives cu_seq_lens too.
        labels: the loss is compared too.
        cache: what the forward gets for a cache.
        training: gradients are compared too.
        number: of the weights, or autocast over float32.
        unpad: ``unpad=True``.
        steps: what happens to the model between loading and running.
        seed: of the tokens.
    """

    family: str = "llama"
    name: str = "auto"
    rows: tuple[Row, ...] = (((0, 4), (0, 3)),)
    described_by: Description = "positions"
    giver: Giver = "caller"
    starts: tuple[int, ...] = (0,)
    hole: bool = False
    mask: str = "int64"
    positions: str = "int64"
    strided: bool = False
    embeds: bool = False
    lengths: bool = False
    labels: bool = False
    cache: CacheUse = "default"
    training: Training = "no"
    number: Number = "float32"
    unpad: bool = False
    steps: tuple[Step, ...] = ()
    seed: int = 1

    def __repr__(self) -> str:
        """Only what differs from the defaults."""
        said = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Example({', '.join(f'{name}={value!r}' for name, value in said)})"

    @property
    def script(self) -> str:
        """To paste into a shell at the project's root."""
        return f'python -c "from tests.fuzz.verdict import *; print(run({self!r}))"'

    @property
    def length(self) -> int:
        """S."""
        return max(sum(before + tokens for before, tokens in row) for row in self.rows)

    @cached_property
    def documents(self) -> list[tuple[int, int, int]]:
        """``(row, start, end)`` of each."""
        found = []
        for number, row in enumerate(self.rows):
            at = 0
            for before, tokens in row:
                found.append((number, at + before, at + before + tokens))
                at += before + tokens
        return found

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents."""
        return any(len(row) > 1 for row in self.rows)

    @property
    def pads(self) -> bool:
        """Whether there is padding, or a hole."""
        return bool((self.real == 0).any())

    @cached_property
    def ids(self) -> torch.Tensor:
        """int64 ``[B, S]`` without special tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(3, 90, (len(self.rows), self.length), generator=generator)

    @cached_property
    def real(self) -> torch.Tensor:
        """int64 ``[B, S]``: 1 for real tokens."""
        real = torch.zeros_like(self.ids)
        for row, a, b in self.documents:
            real[row, a:b] = 1
            if self.hole and b - a >= 5:
                real[row, (a + b) // 2] = 0
        return real

    @cached_property
    def document_ids(self) -> torch.Tensor:
        """int64 ``[B, S]``: documents of a row from 1 on, 0 for padding."""
        found = torch.zeros_like(self.ids)
        last, number = -1, 0
        for row, a, b in self.documents:
            number = number + 1 if row == last else 1
            found[row, a:b] = number
            last = row
        return found * self.real

    @cached_property
    def where(self) -> torch.Tensor:
        """int64 ``[B, S]``: positions of real tokens, counted within their document; padding goes on or has 1."""
        where = torch.ones_like(self.ids)
        for number, (row, a, b) in enumerate(self.documents):
            start = self.starts[number % len(self.starts)]
            where[row, a:b] = FIRST.get(self.family, 0) + start + (self.real[row, a:b].cumsum(0) - 1).clamp(min=0)
        return where

    @cached_property
    def cumulative(self) -> torch.Tensor:
        """int32 ``[documents + 1]``; padding is a document of its own."""
        cuts = {0}
        for row in range(len(self.rows)):
            cuts |= {row * self.length, (row + 1) * self.length}
        for row, a, b in self.documents:
            cuts |= {row * self.length + a, row * self.length + b}
        return torch.tensor(sorted(cuts), dtype=torch.int32)

    @cached_property
    def targets(self) -> torch.Tensor:
        """int64 ``[B, S]``: the first token of a document and padding are no targets."""
        targets = torch.where(self.real == 1, self.ids, -100)
        for row, a, _ in self.documents:
            targets[row, a] = -100
        return targets

    def description(self, planes: int) -> dict[str, Any]:
        """The keywords that describe documents and padding.

        Args:
            planes: leading planes of positions, 0 for ``[B, S]``.
        """
        given: dict[str, Any] = {}
        if self.described_by == "collator":
            collate = PackingCollator(first_position=FIRST.get(self.family, 0), return_lengths=self.lengths)
            batch = collate([{"input_ids": self.ids[row, a:b].tolist()} for row, a, b in self.documents])
            assert torch.equal(batch["input_ids"], self.ids)
            given |= {name: x for name, x in batch.items() if name not in ("input_ids", "labels")}
        if "positions" in self.described_by:
            where = self.where.to(getattr(torch, self.positions))
            given["position_ids"] = where[None].expand(planes, *where.shape) if planes else where
        if self.described_by.startswith("document ids"):
            given["attention_mask"] = self.document_ids.to(getattr(torch, self.mask))
        elif self.described_by == "lengths":
            longest = int(max(b - a for a, b in pairwise(self.cumulative.tolist())))
            given |= {f"cu_seq_lens_{side}": self.cumulative for side in "qk"}
            given |= {f"max_length_{side}": longest for side in "qk"}
        elif self.described_by.startswith("index"):
            given["seq_idx"] = (self.document_ids - 1).clamp(min=0).to(torch.int32)
        if self.described_by in ("nothing", "positions and mask", "index and mask") and (
            self.pads or self.described_by != "nothing"
        ):
            given["attention_mask"] = self.real.to(getattr(torch, self.mask))
        if self.strided:
            given = {
                name: strided(x) if isinstance(x, torch.Tensor) and x.ndim == 2 else x for name, x in given.items()
            }
        return given


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values ``[B, S]`` in memory of another order."""
    apart = torch.empty(x.shape[1], x.shape[0] * 2, dtype=x.dtype)
    view = apart[:, ::2].T
    view.copy_(x)
    return view
