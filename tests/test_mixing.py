from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import InvalidInputError, UnsupportedAttentionError
from axattn.mixing import mixers, reads_first
from tests.census.configs import tiny
from tests.models import positions, tokens

ROWS = tf.AutoModelForSequenceClassification


def made(model_type: str, auto: Any, head: str = "masked", **options: Any) -> Any:
    torch.manual_seed(0)
    config = tiny(model_type, head)
    for key, value in options.items():
        setattr(config, key, value)
    return auto.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "auto", "head", "part"),
    [
        ("mobilebert", tf.AutoModelForMaskedLM, "masked", "mobilebert.embeddings puts neighbouring tokens together"),
        ("fnet", tf.AutoModelForMaskedLM, "masked", "in layers of its own, not in attention"),
        ("xlstm", tf.AutoModelForCausalLM, "causal", "in layers of its own, not in attention"),
    ],
)
def test_models_that_mix_tokens_by_other_means_take_no_packed_rows(
    model_type: str, auto: Any, head: str, part: str
) -> None:
    model = axattn.apply(made(model_type, auto, head), "auto")
    ids = tokens(1, 16)
    cache = {"use_cache": False} if head == "causal" else {}
    assert [reason for reason in mixers(model) if part in reason.text]
    with pytest.raises(UnsupportedAttentionError, match=part):
        model(ids, position_ids=positions((9, 7)), **cache)
    assert model(ids, **cache).logits.isfinite().all()


def test_mobilebert_without_its_trigrams_mixes_nothing() -> None:
    assert not mixers(made("mobilebert", tf.AutoModelForMaskedLM, trigram_input=False))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "bert", "albert"])
def test_a_head_with_one_output_a_row_takes_no_packed_rows(model_type: str) -> None:
    """ALBERT's hands all its inputs on, and would have no door of its own."""
    model = axattn.apply(made(model_type, ROWS), "auto")
    with pytest.raises(UnsupportedAttentionError, match="one output a row"):
        model(tokens(1, 10), position_ids=positions((4, 6)))
    assert model(tokens(1, 10)).logits.shape == (1, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_a_head_that_reads_the_first_token_is_not_given_padding_there(name: str) -> None:
    """What a kernel computes for padding is not what eager attention does: a classifier would read another number."""
    model = axattn.apply(made("bert", ROWS), name)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    assert model(tokens(2, 10), attention_mask=mask.flip(1)).logits.isfinite().all()
    if name == "eager":
        assert model(tokens(2, 10), attention_mask=mask).logits.isfinite().all()
        return
    with pytest.raises(InvalidInputError, match="padded on the left"):
        model(tokens(2, 10), attention_mask=mask)


@pytest.mark.parametrize(
    ("model_type", "options", "first"),
    [
        ("bert", {}, True),
        ("modernbert", {"classifier_pooling": "cls"}, True),
        ("modernbert", {"classifier_pooling": "mean"}, False),
        ("llama", {}, False),
        ("gpt2", {}, False),
        ("bart", {}, False),
    ],
)
def test_which_token_a_head_reads_is_read_from_its_source(model_type: str, options: Any, first: bool) -> None:
    assert reads_first(made(model_type, ROWS, **options)) is first
