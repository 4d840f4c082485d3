"""Transformers' continuous batching on models whose kernel is axattn's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import axattn
from axattn.errors import UnsupportedAttentionError
from axattn.patches.paged_steps import METHOD
from tests.fakes.machine import hopper
from tests.models import build
from tests.sampling import part_of

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]


def _answers(model: Any) -> list[list[int]]:
    greedy = tf.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    made = model.generate_batch(
        PROMPTS, generation_config=greedy, continuous_batching_config=small, progress_bar=False, warmup=False
    )
    assert [answer.error for answer in made.values()] == [None, None]
    return [answer.generated_tokens for answer in made.values()]


def _alone(model: Any) -> list[list[int]]:
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), **given)[0, ids.shape[1] :].tolist() for ids in prompts
    ]


@pytest.mark.parametrize(
    ("family", "name"),
    part_of([("llama", "varlen"), ("mistral", "auto"), ("gpt_oss", "auto")], kept=[("mistral", "auto")]),
)
def test_paged_steps_run_on_a_name_of_transformers_and_axattns_is_back_after(family: str, name: str) -> None:
    model = build(family)
    model.set_attn_implementation("eager")
    wanted = _alone(model)
    axattn.apply(model, name)
    for _ in range(2):
        assert _answers(model) == wanted
        assert model.config._attn_implementation == name
    assert _alone(model) == wanted


@pytest.mark.nightly
def test_a_copy_batches_on_its_own() -> None:
    model = axattn.apply(build("llama"), "varlen", unpad=True)
    other: Any = copy.deepcopy(model)
    assert vars(other)[METHOD].model is other
    assert _answers(other) == _answers(model)
    assert other.config._attn_implementation == "varlen"


def test_a_flash_name_that_transformers_switches_to_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.generation.continuous_batching.continuous_api as api

    wanted = _alone(build("llama"))
    with hopper("flash_attention_2"):
        monkeypatch.setattr(api, "is_flash_attn_3_available", lambda **_: False, raising=False)
        monkeypatch.setattr(api, "is_flash_attn_2_available", lambda **_: True, raising=False)
        model = axattn.apply(build("llama"), "varlen")
        assert _answers(model) == wanted
        assert model.config._attn_implementation == "varlen"


def test_a_model_switched_to_another_name_without_axattn_batches_there() -> None:
    wanted = _alone(build("llama"))
    model: Any = axattn.apply(build("llama"), "varlen")
    model.set_attn_implementation("sdpa")
    assert _answers(model) == wanted
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_a_softcap_that_paged_attention_would_drop_is_refused(name: str) -> None:
    model: Any = axattn.apply(build("gemma2"), name)
    with pytest.raises(UnsupportedAttentionError, match=r"continuous batching can't serve Gemma2.*softcap"):
        _answers(model)
    assert model.config._attn_implementation == name
    assert model(torch.tensor(PROMPTS[:1])).logits.isfinite().all()


def test_restore_takes_the_method_back() -> None:
    model = axattn.apply(build("llama"), "varlen")
    assert METHOD in vars(model)
    assert METHOD not in vars(axattn.restore(model))
