"""Padding that is read: the last token of rows padded on the right, by ``generate`` and ``logits_to_keep``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import InvalidInputError
from axattn.hf.forward_inputs import cache_keyword
from tests.conformance.families import FAMILIES
from tests.models import build, tokens


def padded(real: int = 6) -> dict[str, torch.Tensor]:
    """Two rows of eight tokens, one with `real` of them and padding on the right."""
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, real:] = 0
    return {"input_ids": tokens(2, 8) * mask, "attention_mask": mask}


def generated(model: Any, **options: Any) -> Any:
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return model.generate(**padded(), **greedy, output_logits=True, return_dict_in_generate=True, **options)


def bert() -> Any:
    model = tf.BertLMHeadModel(FAMILIES["bert"].make().config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 7},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["auto", "varlen"])
@torch.no_grad()
def test_rows_padded_on_the_right_generate_what_eager_does(name: str, way: str) -> None:
    expected = generated(build("llama"), **WAYS[way])
    found = generated(axattn.apply(build("llama"), name), **WAYS[way])
    assert torch.equal(found.sequences, expected.sequences)
    for found_logits, expected_logits in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(found_logits, expected_logits, atol=1e-4)


@pytest.mark.parametrize("name", ["auto", "varlen"])
@torch.no_grad()
def test_a_language_model_that_is_no_decoder_generates_what_eager_does(name: str) -> None:
    """BERT's, of a config that says nothing of a decoder: every token sees the whole row."""
    once = {**padded(), "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    expected, found = (model.generate(**once).logits[0] for model in (bert(), axattn.apply(bert(), name)))
    assert torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
def test_an_encoder_whose_decoder_generates_makes_no_dense_mask() -> None:
    model = axattn.apply(FAMILIES["t5"].make(), "auto")
    seen: list[Any] = []
    layer = model.encoder.block[0].layer[0]
    layer.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["attention_mask"].pattern), with_kwargs=True
    )
    model.generate(**padded(), max_new_tokens=2)
    assert [pattern is None for pattern in seen] == [False]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "llama4"])
@torch.no_grad()
def test_a_last_token_alone_is_right_or_refused(family: str) -> None:
    """A window of 5, or a chunk of 4, that ends 2 tokens after the real ones holds some of them, 5 after none."""
    model, given = build(family), padded()
    expected = model(**given).logits
    axattn.apply(model, "auto")
    assert torch.allclose(model(**given, logits_to_keep=1).logits, expected[:, -1:], atol=1e-4)
    real = given["attention_mask"].bool()
    assert torch.allclose(model(**given).logits[real], expected[real], atol=1e-4)
    blind = padded(3)
    if family in ("mistral", "gemma3", "llama4"):
        with pytest.raises(InvalidInputError, match=r"padded on the right.*padding_side"):
            model(**blind, logits_to_keep=1)
    real = blind["attention_mask"].bool()
    assert torch.allclose(model(**blind).logits[real], build(family)(**blind).logits[real], atol=1e-4)


@torch.no_grad()
def test_padding_that_no_output_reads_makes_no_dense_mask() -> None:
    model = axattn.apply(build("llama"), "varlen")
    seen: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"].pattern), with_kwargs=True
    )
    left = {key: value.flip(1) for key, value in padded().items()}
    for given, keep in ((padded(), 0), (padded(), 3), (left, 1), (padded(), 1)):
        model(**given, logits_to_keep=keep)
    assert [pattern is None for pattern in seen] == [False, False, False, True]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_a_single_token_is_never_left_out(family: str) -> None:
    """A row that has ended is given mask 0 for its next token."""
    found = []
    for model in (build(family), axattn.apply(build(family), "varlen")):
        cache = tf.DynamicCache(config=model.config)
        word = {cache_keyword(model): cache}
        left = {key: value.flip(1) for key, value in padded().items()}
        model(**left, **word)
        mask = torch.cat([left["attention_mask"], torch.tensor([[1], [0]])], 1)
        found.append(model(tokens(2, 1), attention_mask=mask, **word).logits)
    assert torch.allclose(*found, atol=1e-4)
