"""ESM's embeddings are scaled by the share of masked tokens in a row: in packed rows, by that of each document."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import axattn
from axattn.patches.forward_wrapper import ForwardWrapper
from axattn.traits.token_mixers import mixers, scaled_by_share
from tests.conformance.cases import Batch, packed, padded

MASKED, PADDING = 4, 1
FIRST = PADDING + 1  # ESM counts positions from there
ROWS = packed((7, 11, 3), (5, 9), (3, 4, 12), pad=2)


def esm(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 97, "pad_token_id": PADDING, "mask_token_id": MASKED}
    given = {**sizes, **tokens, "position_embedding_type": "rotary", "token_dropout": True, **options}
    model = transformers.EsmForMaskedLM(transformers.EsmConfig(**given)).eval()
    model.config._attn_implementation = "eager"
    return model


def masked(batch: Batch) -> Batch:
    """Every third token of a row masked: another share in each document."""
    ids = batch.ids.clamp(min=5)
    ids[:, ::3] = MASKED
    ids[:, 1] = MASKED
    return Batch(ids, batch.documents, batch.positions)


def alone(model: Any, batch: Batch) -> torch.Tensor:
    return torch.cat([model(batch.ids[row : row + 1, a:b]).logits[0] for row, a, b in batch.documents])


def cut(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits[row, a:b] for row, a, b in batch.documents])


@pytest.mark.parametrize("kind", ["rotary", "absolute"])
@pytest.mark.parametrize("name", ["auto", "varlen"])
def test_packed_rows_equal_documents_alone(name: str, kind: str) -> None:
    batch = masked(ROWS)
    seed = torch.randn(sum(b - a for _, a, b in batch.documents), 97, generator=torch.Generator().manual_seed(1))
    reference, model = esm(position_embedding_type=kind), axattn.apply(esm(position_embedding_type=kind), name)
    expected = alone(reference, batch)
    found = cut(batch, model(batch.ids, position_ids=batch.positions + FIRST, attention_mask=batch.mask).logits)
    assert torch.allclose(found, expected, atol=1e-5)
    (expected * seed).sum().backward()
    (found * seed).sum().backward()
    for (where, one), other in zip(reference.named_parameters(), model.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(other.grad, one.grad, atol=1e-4), where


@torch.no_grad()
def test_documents_known_by_their_ids_or_positions_alone() -> None:
    """Rotary positions may start anywhere."""
    batch = masked(packed((7, 11, 3), (5, 16)))
    model, expected = axattn.apply(esm(), "auto"), alone(esm(), batch)
    document_ids = torch.zeros_like(batch.ids)
    for row, a, b in batch.documents:
        document_ids[row, a:b] = document_ids[row].max() + 1
    for given in (
        {"attention_mask": document_ids},
        *({"position_ids": batch.positions + first} for first in (0, FIRST)),
    ):
        assert torch.allclose(cut(batch, model(batch.ids, **given).logits), expected, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_unpadded_rows_keep_their_share(side: str) -> None:
    batch = masked(padded(12, 7, 5, side=side))
    ids = batch.ids.masked_fill(batch.mask == 0, PADDING)
    model = axattn.apply(esm(), "auto", unpad=True)
    assert torch.allclose(cut(batch, model(ids, attention_mask=batch.mask).logits), alone(esm(), batch), atol=1e-5)


@torch.no_grad()
def test_a_graph_stops_where_rows_are_packed() -> None:
    torch._dynamo.reset()
    batch = masked(packed((7, 11, 3)))
    model, reference = axattn.apply(esm(num_hidden_layers=1), "auto"), esm(num_hidden_layers=1)
    run = torch.compile(model, backend="eager")
    assert torch.allclose(run(batch.ids).logits, reference(batch.ids).logits, atol=1e-5)
    with pytest.raises(RuntimeError, match="document by document"):
        run(batch.ids, position_ids=batch.positions + FIRST)


def test_other_embeddings_stay_as_they_are_and_restore_puts_all_back() -> None:
    assert not scaled_by_share(axattn.apply(esm(token_dropout=False), "auto"))
    model = axattn.apply(esm(), "auto")
    assert isinstance(model.esm.embeddings.forward, ForwardWrapper)
    axattn.restore(model)
    assert "forward" not in vars(model.esm.embeddings)


def test_split_rows_are_refused() -> None:
    (reason,) = mixers(esm())
    assert "share of masked tokens" in reason.text
    assert not mixers(esm(), by_document=True)
