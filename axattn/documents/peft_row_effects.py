"""What others do to a model's tokens by row, behind its inputs: NEFTune's noise, PEFT's adapters.

Rows of another length, or of several documents, would get other noise and other adapters, and nobody would know.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.errors import Reason
from axattn.hf import contracts
from axattn.hf.integrations import adapter_keywords, adapters_run

_OF_TOKENS = {
    "alora_offsets": "aLoRA adapts the tokens behind the last invocation in each row",
    "scalings": "X-LoRA has a scaling for each token of the rows that it was given",
}
_OF_ROWS = {
    "adapter_names": "adapter_names chooses an adapter for each row",
    "task_ids": "Poly mixes its adapters by row (task_ids)",
}


def reasons_by_row(model: torch.nn.Module, *, rows_stay: bool = False) -> list[Reason]:
    """Why the rows of this forward can't be put together, or cut.

    Args:
        model: whose forward runs.
        rows_stay: each row stays one, and only its tokens are shared out.
    """
    texts = _OF_TOKENS if rows_stay else _OF_TOKENS | _OF_ROWS
    given = adapter_keywords(model)
    unknown = contracts.reasons("adapters by row") if adapters_run() else []
    adapters = [Reason("adapter", text) for name, text in texts.items() if given.get(name) is not None]
    return [*unknown, *_of_noise(model), *adapters]


def reasons_by_document(model: torch.nn.Module) -> list[Reason]:
    """Why rows of this forward can't hold several documents."""
    if adapters_run() and (unknown := contracts.reasons("adapters by row")):
        return unknown
    offsets = adapter_keywords(model).get("alora_offsets") or ()
    return [Reason("adapter", _OF_TOKENS["alora_offsets"])] if any(offset is not None for offset in offsets) else []


def _of_noise(model: torch.nn.Module) -> list[Reason]:
    """NEFTune's noise (arXiv:2310.05914), which Trainer puts on the embeddings in training, is divided by the root of a
    row's length."""
    if not model.training:
        return []
    try:
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # Transformers' word for a model that has none
        return []
    if getattr(embeddings, "neftune_noise_alpha", None):
        return [Reason("noise", "NEFTune scales its noise by the length of a row, which would be another")]
    return []
