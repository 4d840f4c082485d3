"""Reads the documents of a data set's examples: columns of integers, one value per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from axattn.errors import InvalidInputError, Reason

IGNORE_INDEX = -100
"""The label of tokens that are no targets (``torch.nn.functional.cross_entropy``)."""
_CONSUMED = ("attention_mask", "position_ids", "seq_lengths", "completion_mask", "assistant_masks")
_MASKS = ("attention_mask", "completion_mask", "assistant_masks")
"""Features whose 0 and 1 may be floats."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: token features of equal length (``input_ids``, ``labels``, ...)."""

    features: Mapping[str, list[int]]

    def __len__(self) -> int:
        return len(self.features["input_ids"])

    def piece(self, start: int, end: int) -> Document:
        """Tokens ``[start, end)`` as a separate document, whose first token is not a target."""
        part = {key: values[start:end] for key, values in self.features.items()}
        part["labels"] = [IGNORE_INDEX, *part["labels"][1:]]
        return Document(part)


def documents_of(feature: Mapping[str, Any], at: int) -> list[Document]:
    """The documents of one example, with labels and without the padding that its attention mask marks.

    Args:
        feature: the example's columns.
        at: its index in the batch, for errors.

    Raises:
        InvalidInputError: it has no tokens, or a column that is not one integer per token.
    """
    if not isinstance(feature, Mapping):
        text = f"example {at} is a {type(feature).__name__}, not a mapping with input_ids"
        raise InvalidInputError(text, advice='Give [{"input_ids": [...]}, ...].')
    if feature.get("input_ids") is None:
        raise InvalidInputError(f"example {at} has no input_ids", advice="Tokenise the data set first.")
    columns = {key: _ints(feature[key], key, at) for key in feature if feature[key] is not None}
    count = len(columns["input_ids"])
    lengths = columns.pop("seq_lengths", None)
    reasons = [
        Reason(key, f"{key} has {len(values)} values for {count} tokens")
        for key, values in columns.items()
        if len(values) != count
    ]
    if lengths is not None and min(lengths, default=0) < 0:
        reasons.append(Reason("seq_lengths", f"seq_lengths holds {min(lengths)}"))
    if lengths is not None and sum(lengths) != count:
        reasons.append(Reason("seq_lengths", f"seq_lengths add up to {sum(lengths)} for {count} tokens"))
    if reasons:
        raise InvalidInputError(f"example {at} can't be packed", reasons)
    labels = list(columns.get("labels", columns["input_ids"]))
    for key in ("completion_mask", "assistant_masks"):
        if key in columns:
            labels = [label if kept else IGNORE_INDEX for label, kept in zip(labels, columns[key], strict=True)]
    kept = columns.get("attention_mask", [1] * count)
    starts = sorted({*_starts(columns.get("position_ids"), lengths, count), *_changes(kept)})
    columns = {key: values for key, values in columns.items() if key not in _CONSUMED} | {"labels": labels}
    documents = []
    for a, b in zip(starts, [*starts[1:], count], strict=True):
        real = [i for i in range(a, b) if kept[i]]
        if not real:
            continue
        part = {key: [values[i] for i in real] for key, values in columns.items()}
        part["labels"][0] = IGNORE_INDEX
        documents.append(Document(part))
    if not documents:
        raise InvalidInputError(f"example {at} has no tokens", advice="Filter empty examples out of the data set.")
    return documents


def _starts(positions: list[int] | None, lengths: list[int] | None, count: int) -> list[int]:
    if lengths is not None:
        return [0, *accumulate(lengths)][:-1] if lengths else [0]
    if positions is None:
        return [0]
    return [i for i in range(count) if i == 0 or positions[i] != positions[i - 1] + 1]


def _changes(mask: list[int]) -> list[int]:
    """The indices where a mask of document ids (1, 2, 3, ..., and 0 for padding) switches to another document."""
    real = [i for i, number in enumerate(mask) if number]
    return [i for before, i in pairwise(real) if mask[i] != mask[before]]


def _ints(values: Any, key: str, at: int) -> list[int]:
    """The integers of a feature.

    Raises:
        InvalidInputError: it is not a flat list of integers.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    flat = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if flat and all(type(value) is int for value in values):
        return list(values)
    wrong = [value for value in values if not _is_number(value, key)][:1] if flat else [values]
    if wrong:
        shown = repr(wrong[0]) if len(repr(wrong[0])) <= 40 else f"{repr(wrong[0])[:40]}..."
        raise InvalidInputError(
            f"example {at}: {key} is not a flat list of integers",
            [Reason(key, f"it holds {shown}" if flat else f"it is {shown}")],
            "Tokenise the data set, and leave out columns that are not per token.",
        )
    return [int(value) for value in values]


def _is_number(value: Any, key: str) -> bool:
    """Whether a value of a feature is an integer; in masks it may be a bool or a float."""
    if getattr(value, "shape", None) == ():  # of numpy or torch
        value = value.item()
    return isinstance(value, int) or (isinstance(value, float) and key in _MASKS and value.is_integer())
