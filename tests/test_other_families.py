"""Encoders, an encoder-decoder, two head dims and sparse indices: `auto` equals eager on each document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from tests.models import LAYERS, SMALL, alone, amplify, positions, tokens

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def made(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = cls(config) if isinstance(cls, type) and issubclass(cls, tf.PreTrainedModel) else cls.from_config(config)
    amplify(model)
    return model.eval()


def encoder(name: str) -> Any:
    if name == "bert":
        return made(tf.BertModel, tf.BertConfig(num_hidden_layers=2, **SIZES))
    return made(tf.ModernBertModel, tf.ModernBertConfig(num_hidden_layers=3, local_attention=6, **SPECIAL, **SIZES))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_encoders_padded_and_packed(name: str) -> None:
    model = encoder(name)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    model.set_attn_implementation("eager")
    whole, short = model(ids)[0], model(ids[1:, :7])[0]
    parts = torch.cat([model(ids[:1, :5])[0], model(ids[:1, 5:])[0]], 1)
    axattn.apply(model, "auto")
    padded = model(ids, attention_mask=mask)[0]
    assert torch.allclose(padded[:1], whole[:1], atol=1e-5)
    assert torch.allclose(padded[1:, :7], short, atol=1e-5)
    assert torch.allclose(model(ids[:1], position_ids=positions((5, 7)))[0], parts, atol=1e-5)
    assert {kernel for layer in axattn.status(model).layers for kernel in layer.served} == {"varlen"}


@torch.no_grad()
def test_t5_whose_stacks_have_configs_of_their_own_really_runs_through_axattn() -> None:
    config = tf.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = made(tf.T5ForConditionalGeneration, config)
    for name, parameter in model.named_parameters():
        if "relative" in name:
            parameter.data.normal_(std=3)  # a dropped position bias must show
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens(2, 6, 3)}
    before = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    with axattn.using(model, "eager"):
        expected = model(**inputs).logits
        written = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    axattn.apply(model, "auto")
    assert torch.allclose(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    layers = axattn.status(model).layers
    assert len(layers) == 6
    assert all(layer.served for layer in layers)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), written)
    axattn.restore(model)
    after = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert after == before


@torch.no_grad()
def test_gemma_4_with_two_head_dims_and_shared_keys_packed() -> None:
    own = {"head_dim": 8, "global_head_dim": 16, "sliding_window": 5, "layer_types": LAYERS * 2, "num_hidden_layers": 4}
    own |= {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
    model = made(tf.AutoModelForCausalLM, tf.Gemma4TextConfig(**{**SMALL, **own}))
    expected = alone(model, tokens(1, 18), (7, 11))
    axattn.apply(model, "auto")
    found = model(tokens(1, 18), position_ids=positions((7, 11))).logits
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 2e-5
    assert {kernel for layer in axattn.status(model).layers for kernel in layer.served} == {"varlen"}


@torch.no_grad()
def test_sparse_indices_are_honoured_packed() -> None:
    own = {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    own |= {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 16}
    own |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "index_topk": 4, "index_head_dim": 16}
    # many index heads: their scores pass a ReLU, and keys that tie at zero are picked in no fixed order
    model = made(tf.AutoModelForCausalLM, tf.DeepseekV32Config(**{**SMALL, **own, "index_n_heads": 16}))
    expected = alone(model, tokens(1, 12), (5, 7))
    axattn.apply(model, "auto")
    found = model(tokens(1, 12), position_ids=positions((5, 7))).logits
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 2e-5
