from __future__ import annotations

import pytest
import torch
import transformers as tf

import axattn
from axattn.traits.losses import predicts_next
from tests.census.configs import tiny
from tests.census.examine import build
from tests.models import tokens


@pytest.mark.parametrize(
    ("model_type", "auto", "head", "answer"),
    [
        ("llama", tf.AutoModelForCausalLM, "causal", True),
        ("gpt2", tf.AutoModelForCausalLM, "causal", True),
        ("bert", tf.AutoModelForCausalLM, "causal", True),
        ("whisper", tf.AutoModelForCausalLM, "causal", False),
        ("bert", tf.AutoModelForMaskedLM, "masked", False),
        ("llama", tf.AutoModelForTokenClassification, "causal", False),
        ("gemma3", tf.AutoModelForImageTextToText, "vision", True),
    ],
)
def test_whether_a_loss_is_that_of_the_next_token(model_type: str, auto: type, head: str, answer: bool) -> None:
    model = auto.from_config(tiny(model_type, head))  # type: ignore[attr-defined]  # every auto class has it
    assert predicts_next(model) is answer


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "whisper"])
def test_an_unpadded_head_has_the_loss_of_the_padded_one(model_type: str) -> None:
    """The first token of a row is nobody's target; on the flat row the token before it belongs to another row."""
    model = build(model_type, "causal")
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = model(**batch).loss
    axattn.apply(model, "auto", unpad=True)
    assert torch.allclose(model(**batch, use_cache=False).loss, expected, atol=1e-5)
