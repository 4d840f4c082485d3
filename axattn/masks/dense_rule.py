"""`dense_rule`: which keys a query attends to, as a bool tensor. The only implementation of causal, windowed, chunked
and document masks in tensor operations; `axattn.masks.varlen_layout` has the same rules as spans."""

from __future__ import annotations

import functools

import torch

from axattn.hf.torch_internals import running_max


def dense_rule(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None = None,
    offset: int = 0,
    documents: torch.Tensor | None = None,
    chunk: int | None = None,
    positions: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The dense form of a mask. Reads no tensor values on the host.

    Args:
        queries: S.
        keys: T.
        causal: a query attends to no later key.
        window: visible keys to the left, including the query's own; as many to the right if not causal.
        offset: index of the first query among the keys (``T - S``: aligned bottom-right).
        documents: ``[B, T]``, the document id of each key (S equals T), or None.
        chunk: chunk size in tokens, or None; a query attends only to keys of its own chunk.
        positions: ``[B or 1, T]``, positions that define the chunks (`chunk_positions`); None: the index in the row.
        padding: bool ``[B, T]`` (True: a real key), or None.
        device: of the result.

    Returns:
        bool ``[B or 1, 1, S, T]``, True: attend.
    """
    rules = []
    if causal or window is not None:
        distance = torch.arange(offset, offset + queries, device=device)[:, None] - torch.arange(keys, device=device)
        if causal:
            rules.append((distance >= 0)[None])
        if window is not None:
            rules.append((distance.abs() < window)[None])
    if documents is not None:
        rules.append(documents[:, :queries, None] == documents[:, None, :])
    if chunk is not None:
        number = (torch.arange(keys, device=device)[None] if positions is None else positions) // chunk
        rules.append(number[:, offset : offset + queries, None] == number[:, None, :])
    if padding is not None:
        rules.append(padding[:, None, :].expand(-1, queries, -1))
    if not rules:
        return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    return functools.reduce(torch.logical_and, rules)[:, None]


def chunk_positions(
    length: int, documents: torch.Tensor | None, padding: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """int64 ``[B or 1, S]``: positions that define the chunks, counted from the start of a document or from a row's
    first real token.

    Args:
        length: S.
        documents: ``[B, S]``, the document id of each token, or None.
        padding: bool ``[B, S]`` (True: a real token), or None.
        device: of the result.
    """
    index = torch.arange(length, device=device)
    starts = torch.zeros(1, length, dtype=torch.long, device=device)
    if padding is not None:
        starts = starts + padding.long().argmax(-1)[:, None]
    if documents is not None:
        new = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
        starts = torch.maximum(starts, running_max(torch.where(new, index, 0)))
    return index - starts
