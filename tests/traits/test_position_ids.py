from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import InvalidInputError, UnsupportedAttentionError
from axattn.traits import position_ids
from tests.census.configs import of_class, tiny
from tests.census.examine import build as census
from tests.models import amplify, build, positions, tokens

LENGTHS = (5, 4, 3)


def roberta() -> Any:
    """Pads with token 1, as the published ones do: positions count from 2."""
    torch.manual_seed(0)
    config = tiny("roberta", "masked")
    config.pad_token_id = 1
    model = tf.AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    amplify(model)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bart", "marian", "pegasus", "blenderbot"])
def test_packed_rows_of_a_model_that_counts_positions_along_the_row_are_refused(model_type: str) -> None:
    """Their decoders take no position_ids: a second document would count on from the first (error 0.5 of 1)."""
    model = axattn.apply(census(model_type, "causal"), "auto")
    ids = tokens(1, sum(LENGTHS))
    with pytest.raises(UnsupportedAttentionError, match="takes no position_ids"):
        model(ids, position_ids=positions(LENGTHS), use_cache=False)
    assert model(ids, use_cache=False).logits.isfinite().all()


@torch.no_grad()
def test_the_encoder_of_t5_needs_no_positions_to_keep_documents_apart() -> None:
    """Its relative bias is the same in every document."""
    torch.manual_seed(0)
    model = tf.T5EncoderModel(tiny("t5", "seq2seq")).eval()
    amplify(model)
    for name, parameter in model.named_parameters():
        if "relative" in name:
            parameter.data.normal_(std=3.0)
    ids = tokens(1, sum(LENGTHS))
    model.set_attn_implementation("eager")
    expected = torch.cat([model(part).last_hidden_state for part in ids.split(LENGTHS, 1)], 1)
    assert not torch.allclose(model(ids).last_hidden_state, expected, atol=0.1)
    axattn.apply(model, "auto")
    assert torch.allclose(model(ids, position_ids=positions(LENGTHS)).last_hidden_state, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "varlen"])
def test_roberta_counts_from_one_past_its_padding_token(name: str) -> None:
    model = roberta()
    ids = tokens(1, sum(LENGTHS))
    expected = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    assert position_ids.first_position(model) == 2
    axattn.apply(model, name)
    with pytest.raises(InvalidInputError, match=r"start at 0, but Roberta\w+ counts from 2") as error:
        model(ids, position_ids=positions(LENGTHS))
    assert "Give position_ids + 2" in str(error.value)
    found = model(ids, position_ids=positions(LENGTHS) + 2).logits
    assert torch.allclose(found, expected, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    at = (positions(LENGTHS) + 2).masked_fill(mask == 0, 1)  # padding has the position of padding
    found = model(ids, position_ids=at, attention_mask=mask).logits
    assert torch.allclose(found[:, :9], expected[:, :9], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_an_unpadded_batch_of_roberta_has_the_positions_of_the_padded_one(side: str, given: str) -> None:
    model = roberta()
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, slice(6, None) if side == "right" else slice(0, 4)] = 0
    ids[mask == 0] = 1
    inputs = {"input_ids": ids} if given == "input_ids" else {"inputs_embeds": model.get_input_embeddings()(ids)}
    expected = model(**inputs, attention_mask=mask).logits[mask.bool()]
    axattn.apply(model, "auto", unpad=True)
    assert torch.allclose(model(**inputs, attention_mask=mask).logits[mask.bool()], expected, atol=1e-4)


@pytest.mark.parametrize(("family", "counts"), [("opt", True), ("llama", False)])
def test_whether_a_model_counts_its_mask_is_read_from_its_file(family: str, counts: bool) -> None:
    assert position_ids.counts_mask(build(family)) is counts


def test_biogpt_s_embedding_could_count_the_mask_but_is_never_asked_to() -> None:
    model = census("biogpt", "causal")
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert position_ids.own_positions(model, None, mask).tolist() == [[0, 1, 2, 3, 4]]
    assert position_ids.own_positions(build("opt"), None, mask)[0, 2:].tolist() == [0, 1, 2]


def test_a_layer_that_counts_only_where_no_positions_come_is_no_counter() -> None:
    assert not position_ids.counting_layers(census("distilbert", "masked"))
    assert position_ids.counting_layers(build("llama4", no_rope_layers=[1, 0]))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta"])
def test_documents_known_by_their_lengths_alone_get_positions_of_their_own(model_type: str) -> None:
    """A table of positions would give the second document those after the first."""
    model = roberta() if model_type == "roberta" else census(model_type, "causal")
    ids = tokens(1, sum(LENGTHS))
    expected = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    axattn.apply(model, "varlen")
    edges = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    found = model(ids, cu_seq_lens_q=edges, cu_seq_lens_k=edges, max_length_q=5, max_length_k=5).logits
    assert torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "unpadded"), [("roberta", True), ("eurobert", True), ("llama", False)])
def test_encoders_run_unpadded_outside_training_too(model_type: str, unpadded: bool) -> None:
    """Their configs say use_cache, and they return none; a decoder's caller may go on from the cache of whole rows."""
    head = "masked" if unpadded else "causal"
    model = axattn.apply(census(model_type, head), "auto", unpad=True)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:] = 0
    logits = model(tokens(2, 10).clamp(min=3), attention_mask=mask).logits
    assert bool((logits[0, 6:] == 0).all()) is unpadded


def test_positions_that_a_model_drops_describe_no_documents() -> None:
    """CSM's depth decoder sets them to None, and chooses weights by a token's place in the row."""
    config = of_class(tf.CsmDepthDecoderConfig, "none")
    model = tf.CsmDepthDecoderModel._from_config(config, attn_implementation="eager")
    assert ["ignores position_ids" in reason.text for reason in position_ids.unread_positions(model)] == [True]
    with pytest.raises(UnsupportedAttentionError, match="ignores position_ids, and counts along the whole row"):
        axattn.apply(model, "auto", unpad=True)
    axattn.apply(model, "auto")
    with pytest.raises(UnsupportedAttentionError, match="ignores position_ids"):
        model(tokens(1, 9), position_ids=positions((4, 5)), use_cache=False)
