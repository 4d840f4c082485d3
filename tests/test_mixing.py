from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import InvalidInputError, UnsupportedAttentionError
from axattn.mixing import mixers
from axattn.pooling import reads_first
from tests.census.configs import tiny
from tests.fakes.machine import hopper
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


# ---- heads that read padding ---------------------------------------------------------------------------------------


def answers(model_type: str, side: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model that finds answers, on Transformers' default kernel, and a padded batch with labels."""
    model = made(model_type, tf.AutoModelForQuestionAnswering, "questions")
    model.set_attn_implementation("sdpa")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, slice(7, 12) if side == "right" else slice(0, 5)] = 0
    first = mask.argmax(-1)
    return model, {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "start_positions": first + 1,
        "end_positions": first + 4,
    }


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "llama", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["auto", "varlen"])
def test_an_answer_is_found_among_all_tokens_of_a_padded_row(model_type: str, side: str, name: str) -> None:
    """The softmax runs over padding too, so padding must attend to what it attends to on Transformers' kernels."""
    model, given = answers(model_type, side)
    expected = model(**given)
    expected.loss.backward()
    wanted = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    found = axattn.apply(model, name)(**given)
    found.loss.backward()
    assert torch.allclose(found.loss, expected.loss, rtol=1e-6)
    assert torch.allclose(found.start_logits, expected.start_logits, atol=1e-5)
    assert torch.allclose(model.get_input_embeddings().weight.grad, wanted, atol=1e-6)
    whole = {key: value for key, value in given.items() if key != "attention_mask"}
    model(**whole, output_hidden_states=True)
    assert {kernel for layer in axattn.status(model).layers for kernel in layer.served} == {"varlen"}


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "sage", "fp8", "xformers"])
def test_kernels_that_leave_padding_out_refuse_it_where_a_head_reads_it(kernel: str) -> None:
    model, given = answers("llama", "right")
    model.config.head_dim = 8
    with hopper(kernel):
        axattn.apply(model, kernel, upgrade_flash=False)
        with pytest.raises(UnsupportedAttentionError, match=r"padding|4-D mask"):
            model(**given)
        del given["attention_mask"]
        assert torch.isfinite(model(**given).loss)


@torch.no_grad()
def test_a_compiled_head_reads_padding_too() -> None:
    model, given = answers("llama", "right")
    expected = model(**given).loss
    axattn.apply(model, "auto")
    assert torch.allclose(torch.compile(model, backend="eager")(**given).loss, expected, rtol=1e-6)
