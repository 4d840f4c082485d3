"""Statistics of each document of a layout, made once for all layers that share it."""

from __future__ import annotations

import torch

from axattn.backends.varlen_engine.packed import span_lengths
from axattn.kernels.document_statistics import Documents, smoothed
from axattn.masks.varlen_layout import Layout


def documents_of(layout: Layout, device: torch.device) -> tuple[Documents, Documents]:
    """The query and the key sequences of a layout, made once for all layers that share it."""

    def make() -> tuple[Documents, Documents]:
        q_lengths, k_lengths = span_lengths(layout)
        return Documents(q_lengths, device), Documents(k_lengths, device)

    return layout.kept("documents", make)


def smoothed_keys(key: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Keys ``[tokens, Hkv, D]`` minus the mean of each document of a layout."""
    return smoothed(key, documents_of(layout, key.device)[1])


def mean_of_keys(key: torch.Tensor, layout: Layout) -> torch.Tensor:
    """For each query, the mean of the keys ``[tokens, Hkv, D]`` of its document: float32 ``[query tokens, Hkv, D]``."""
    queries, keys = documents_of(layout, key.device)
    return queries.spread(keys.mean(key))
