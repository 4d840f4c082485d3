from __future__ import annotations

import pytest
import torch
import transformers as tf

import axattn
from axattn.losses import predicts_next
from tests.census.configs import tiny
from tests.models import amplify, tokens


@pytest.mark.parametrize(
    ("model_type", "auto", "head", "answer"),
    [
        ("llama", tf.AutoModelForCausalLM, "causal", True),
        ("gpt2", tf.AutoModelForCausalLM, "causal", True),
        ("bert", tf.AutoModelForCausalLM, "causal", True),
        ("bert", tf.AutoModelForMaskedLM, "masked", False),
        ("llama", tf.AutoModelForTokenClassification, "causal", False),
        ("gemma3", tf.AutoModelForImageTextToText, "vision", True),
    ],
)
def test_whether_a_loss_is_that_of_the_next_token(model_type: str, auto: type, head: str, answer: bool) -> None:
    model = auto.from_config(tiny(model_type, head))  # type: ignore[attr-defined]  # every auto class has it
    assert predicts_next(model) is answer


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_unpadded_head_without_causal_lm_in_its_name_has_the_loss_of_the_padded_one(
    model_type: str, side: str
) -> None:
    """GPT2LMHeadModel: unshifted labels would be off by 0.19 of the loss."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tiny(model_type), attn_implementation="eager").eval()
    amplify(model)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, slice(6, None) if side == "right" else slice(0, 4)] = 0
    target = mask * torch.nn.functional.pad(mask[:, :-1], (1, 0))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(target == 0, -100)}
    expected = model(**batch).loss
    axattn.apply(model, "auto", unpad=True)
    assert torch.allclose(model(**batch, use_cache=False).loss, expected, atol=1e-5)
