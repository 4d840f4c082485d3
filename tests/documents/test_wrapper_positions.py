"""Positions that a wrapper was given and a model was not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import axattn
from axattn.errors import UnsupportedAttentionError
from tests.models import alone, build, positions, tokens

LENGTHS = (4, 6, 5)
IDS = tokens(1, sum(LENGTHS))


class Wrapper(torch.nn.Module):
    """Passes on what `change` makes of its inputs."""

    def __init__(self, model: Any, change: Any) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        logits: torch.Tensor = self.model(**self.change(input_ids, inputs)).logits
        return logits


def dropped(ids: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": ids}


def apart(ids: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    """A row for each document, padded."""
    rows = torch.nn.utils.rnn.pad_sequence([part[0] for part in ids.split(LENGTHS, 1)], batch_first=True)
    return {"input_ids": rows, "attention_mask": (rows != 0).long()}


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_positions_that_a_wrapper_drops_are_missed(name: str) -> None:
    module = Wrapper(axattn.apply(build("llama"), name), dropped)
    with pytest.raises(UnsupportedAttentionError, match=r"3 documents in 1 rows.*Wrapper was given position_ids"):
        module(IDS, position_ids=positions(LENGTHS))
    assert module(IDS, position_ids=torch.arange(15)[None]).shape == (1, 15, 97)
    padded = positions((15,)).clamp(min=3) - 3  # as `generate` counts them: 0 for padding on the left
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    assert module(IDS, position_ids=padded, attention_mask=mask).shape == (1, 15, 97)


@torch.no_grad()
def test_a_wrapper_that_separates_documents_itself_is_served() -> None:
    model = axattn.apply(build("llama"), "varlen")
    logits = Wrapper(model, apart)(IDS, position_ids=positions(LENGTHS))
    found = torch.cat([logits[row, :length] for row, length in enumerate(LENGTHS)])
    assert torch.allclose(found, alone(build("llama"), IDS, LENGTHS)[0], atol=1e-4)
