from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import UnsupportedAttentionError
from axattn.traits.token_mixers import mixers
from tests.census.configs import tiny
from tests.models import positions, tokens


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
