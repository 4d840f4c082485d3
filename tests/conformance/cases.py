"""What a scenario works with: a reference model on eager, a candidate on the kernel under test, and batches."""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import axattn
from tests.conformance.families import FAMILIES, IMAGE, Family
from tests.models import positions, tokens

Result = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Rows of documents.

    Attributes:
        ids: int64 ``[B, S]``.
        documents: ``(row, start, end)`` of each document; what lies in none is padding.
        positions: int64 ``[B, S]``.
    """

    ids: torch.Tensor
    documents: tuple[tuple[int, int, int], ...]
    positions: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """int64 ``[B, S]``: 1 for a real token."""
        mask = torch.zeros_like(self.ids)
        for row, a, b in self.documents:
            mask[row, a:b] = 1
        return mask


def packed(*rows: tuple[int, ...], pad: int = 0, seed: int = 1) -> Batch:
    """Rows of documents back to back; short rows end in padding, and every row in `pad` more."""
    length = max(sum(row) for row in rows) + pad
    filled = [(*row, length - sum(row)) for row in rows]
    documents = []
    for number, row in enumerate(rows):
        start = 0
        for size in row:
            documents.append((number, start, start + size))
            start += size
    return Batch(tokens(len(rows), length, seed), tuple(documents), positions(*filled))


def padded(*lengths: int, side: str, seed: int = 1) -> Batch:
    """One document a row, padded on one side to the longest."""
    S = max(lengths)
    spans = [(0, n) if side == "right" else (S - n, S) for n in lengths]
    where = torch.stack([(torch.arange(S) - a).clamp(min=0) for a, _ in spans])
    documents = tuple((row, a, b) for row, (a, b) in enumerate(spans))
    return Batch(tokens(len(lengths), S, seed), documents, where)


@dataclass
class Case:
    """One family on one kernel.

    Attributes:
        family: the architecture.
        backend: canonical name under test, ``""`` for the reference.
        options: for the model's config.
        saved: the folder of the weights, "" to save them (one process of a group alone may do that).
    """

    family: Family
    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    saved: str = ""

    def folder(self, **options: Any) -> str:
        """Where the family's weights are saved."""
        return self.saved or str(_saved(self.family.name, tuple(sorted(options.items()))))

    def reference(self, **options: Any) -> Any:
        """A fresh copy of the family's model on eager."""
        model = copy.deepcopy(_made(self.family.name, tuple(sorted(options.items()))))
        model.set_attn_implementation("eager")
        for inner in model.modules():
            if isinstance(inner, PreTrainedModel):  # T5's stacks have configs of their own
                inner.config._attn_implementation = "eager"
        return model

    def candidate(self, share_prefixes: bool = False, **options: Any) -> Any:
        """The same weights, loaded by `axattn.from_pretrained` on the kernel under test."""
        model = axattn.from_pretrained(
            self.folder(**options),
            attn_implementation=self.backend.split(", ")[0],
            on_unsupported="route" if self.backend.endswith(", route") else "raise",
            model_class=type(_made(self.family.name, tuple(sorted(options.items())))),
            local_files_only=True,
            share_prefixes=share_prefixes,
        )
        return model.eval()

    def positions(self, where: torch.Tensor) -> torch.Tensor:
        """Positions in the form that the family takes."""
        return where if not self.family.planes else where[None].expand(self.family.planes, *where.shape)

    def forward(self, model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Logits (or last hidden states) ``[B, S, V]``."""
        if self.family.kind == "encoder-decoder":
            inputs.setdefault("decoder_input_ids", ids.flip(-1))
        out: torch.Tensor = model(ids, **inputs)[0]
        return out

    def alone(self, batch: Batch, model: Any = None, **inputs: Any) -> torch.Tensor:
        """Each document of a batch by itself on eager, one after the other: ``[tokens, V]``."""
        model = self.reference() if model is None else model
        cache = {} if self.family.kind == "encoder" else {"use_cache": False}
        parts = []
        for row, a, b in batch.documents:
            where = {"position_ids": self.positions(batch.positions[row : row + 1, a:b])}
            parts.append(self.forward(model, batch.ids[row : row + 1, a:b], **where, **cache, **inputs)[0])
        return torch.cat(parts)

    @staticmethod
    def cut(batch: Batch, out: torch.Tensor) -> torch.Tensor:
        """The documents' part of a batch's output, one after the other: ``[tokens, V]``."""
        return torch.cat([out[row, a:b] for row, a, b in batch.documents])


def image_inputs(family: Family) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ids ``[1, S]`` with one image in them, and the image's inputs."""
    torch.manual_seed(3)
    if family.name == "qwen2_5_vl":
        ids = torch.tensor([[5, 6, 92, *[IMAGE] * 16, 93, 7, 8, 9]])
        kinds = (ids == IMAGE).long()
        grid = torch.tensor([[1, 8, 8]])
        return ids, {"pixel_values": torch.randn(64, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds}
    ids = torch.tensor([[1, 5, 6, 91, *[IMAGE] * 4, 92, 7, 8, 9, 10, 11]])
    return ids, {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == IMAGE).long()}


@functools.cache
def _made(family: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return FAMILIES[family].make(**dict(options))


@functools.cache
def _saved(family: str, options: tuple[tuple[str, Any], ...]) -> Path:
    folder = Path(_folder().name) / f"{family}-{abs(hash(options))}"
    _made(family, options).save_pretrained(folder)
    return folder


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="conformance-")
