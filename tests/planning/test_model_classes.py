"""Which model classes run through Transformers' attention interface, and towers that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import UnsupportedAttentionError
from axattn.planning.model_classes import inner_model_classes, model_class_reasons
from tests.census.configs import of_class, tiny
from tests.models import CONFIGS, REFUSED, amplify


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_models_outside_the_interface_have_a_reason(family: str) -> None:
    cls = tf.AutoModelForCausalLM._model_mapping[type(REFUSED[family]())]
    (reason,) = model_class_reasons(cls)
    assert "does not use Transformers' attention interface" in reason.text


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_models_of_the_interface_have_none(family: str) -> None:
    config = CONFIGS[family]()
    cls = tf.AutoModelForCausalLM._model_mapping[type(config)]
    assert [r for c in [cls, *inner_model_classes(config)[""]] for r in model_class_reasons(c)] == []


def gemma4(**options: Any) -> Any:
    """A tiny Gemma 4 that hears: its audio tower computes attention in code of its own, over eager masks."""
    config = tiny("gemma4", "vision")
    config.audio_config = of_class(tf.Gemma4AudioConfig, "none")
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config, **options)
    amplify(model)
    return model.float().eval()


def heard(model: Any) -> torch.Tensor:
    """What it says after a sound, whose padding its audio tower masks."""
    generator = torch.Generator().manual_seed(1)
    sound = torch.randn(1, 48, 128, generator=generator)
    mask = torch.ones(1, 48, dtype=torch.bool)
    mask[:, 40:] = False
    features = model.model.get_audio_features(sound, mask)
    count = int(features.attention_mask.sum())
    ids = torch.tensor([[5, 6, *[model.config.audio_token_id] * count, 7, 8, 9]])
    with torch.no_grad():
        logits: torch.Tensor = model(ids, input_features=sound, input_features_mask=mask).logits
    return logits


def test_auto_leaves_a_tower_with_attention_of_its_own_on_eager() -> None:
    expected = heard(gemma4(attn_implementation="eager"))
    model = gemma4()
    before = model.config.audio_config._attn_implementation
    plan = axattn.plan(model, "auto")
    assert plan.running["audio_config"] == "eager"
    assert plan.running["text_config"] == "auto"
    assert any("audio_config runs on eager: Gemma4AudioModel" in note for note in plan.notes)
    axattn.apply(model, "auto")
    assert torch.allclose(heard(model), expected, atol=1e-4)
    axattn.restore(model)
    assert model.config.audio_config._attn_implementation == before


def test_a_name_that_must_hold_everywhere_is_refused_with_what_to_type() -> None:
    model = gemma4()
    with pytest.raises(UnsupportedAttentionError, match=r"Gemma4AudioModel .*'audio_config': 'eager'") as refused:
        axattn.apply(model, "varlen")
    names = eval(refused.value.advice.split("=", 1)[1].split("}")[0] + "}")  # what a user would type
    axattn.apply(model, names)
    assert torch.allclose(heard(model), heard(gemma4(attn_implementation="eager")), atol=1e-4)
    axattn.apply(model, "varlen", on_unsupported="route")
    assert axattn.plan(model, "varlen", on_unsupported="route").running["audio_config"] == "eager"
