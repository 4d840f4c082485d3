"""Effects that depend on a token's row but are not inputs of the model: NEFTune's noise, PEFT's adapters.

Rows of another length, or with several documents, would silently get other noise and other adapters.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.errors import Reason
from axattn.hf import contracts
from axattn.hf.integrations import adapter_keywords, adapters_run

_PER_TOKEN = {
    "alora_offsets": "aLoRA adapts the tokens after the last invocation in each row",
    "scalings": "X-LoRA has a scaling for each token of the rows that it was given",
}
_PER_ROW = {
    "adapter_names": "adapter_names chooses an adapter for each row",
    "task_ids": "Poly mixes its adapters by row (task_ids)",
}


def reasons_by_row(model: torch.nn.Module, *, rows_stay: bool = False) -> list[Reason]:
    """Why the rows of this forward can't be joined or split.

    Args:
        model: the running model.
        rows_stay: rows are not joined, only their tokens are split over ranks.
    """
    texts = _PER_TOKEN if rows_stay else _PER_TOKEN | _PER_ROW
    given = adapter_keywords(model)
    unknown = contracts.reasons("adapters by row") if adapters_run() else []
    adapters = [Reason("adapter", text) for name, text in texts.items() if given.get(name) is not None]
    return [*unknown, *_noise_reasons(model), *adapters]


def reasons_by_document(model: torch.nn.Module) -> list[Reason]:
    """Why rows of this forward can't hold several documents."""
    if adapters_run() and (unknown := contracts.reasons("adapters by row")):
        return unknown
    offsets = adapter_keywords(model).get("alora_offsets") or ()
    return [Reason("adapter", _PER_TOKEN["alora_offsets"])] if any(offset is not None for offset in offsets) else []


def _noise_reasons(model: torch.nn.Module) -> list[Reason]:
    """NEFTune's noise (arXiv:2310.05914), which Trainer adds to the embeddings in training, is divided by the square
    root of the row length."""
    if not model.training:
        return []
    try:
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # Transformers raises this for a model without them
        return []
    if getattr(embeddings, "neftune_noise_alpha", None):
        return [Reason("noise", "NEFTune scales its noise by the length of a row, which would change")]
    return []
