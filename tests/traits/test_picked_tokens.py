"""Heads that find their token by its id, not by the mask: it may be padding, and is what eager makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.modeling_outputs import SequenceClassifierOutput

import axattn
from axattn.errors import InvalidInputError
from axattn.traits.picked_tokens import Pick, column_of
from axattn.traits.pooling import picked
from tests.fakes.machine import hopper
from tests.models import tokens
from tests.traits.test_pooling import tiny_of

END = 3
CAUSAL = tf.LlamaForSequenceClassification
ENDS = {"eos_token_id": END}


def batch(side: str, pad: int) -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, one of seven, padded with `pad`; each ends with `END`."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, slice(7, 12) if side == "right" else slice(0, 5)] = 0
    ids = tokens(2, 12).clamp(min=5, max=90)
    ids[0, 6 if side == "right" else 11] = ids[1, 11] = END
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def embedded(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "inputs_embeds": model.get_input_embeddings()(given["input_ids"]),
        "attention_mask": given["attention_mask"],
    }


def result(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(**given)
    read: torch.Tensor = found.logits if "logits" in found else found.pooler_output
    return read


HEADS = (
    (tf.LlamaForSequenceClassification, {}, True),
    (tf.GPT2ForSequenceClassification, {}, True),
    (tf.OPTForSequenceClassification, {}, True),
    (tf.Qwen3ForSequenceClassification, {}, True),
    (tf.MistralForSequenceClassification, {"sliding_window": 8}, True),
    (tf.CLIPTextModel, ENDS, False),
    (tf.CLIPTextModel, {"eos_token_id": 2}, False),
    (tf.MetaClip2TextModel, ENDS, False),
    (tf.OwlViTTextModel, {}, False),
)
"""Classes, what their config says, and whether they may run unpadded."""


@pytest.mark.parametrize(("cls", "options", "unpads"), HEADS, ids=lambda x: getattr(x, "__name__", None))
@torch.no_grad()
def test_a_token_that_a_head_finds_by_its_id_is_right_though_it_is_padding(
    cls: Any, options: Any, unpads: bool
) -> None:
    """Rows padded with 0 (``config.pad_token_id``), with their end, or with the largest id."""
    eager = tiny_of(cls, **options)
    eager.config.pad_token_id = 0
    for unpad in {False, unpads}:
        model = axattn.apply(copy.deepcopy(eager), "auto", unpad=unpad)
        for pad in (0, END, 96):
            given = batch("right", pad)
            assert torch.allclose(result(model, given), result(eager, given), atol=1e-4), (pad, unpad)
            if unpads:
                given = embedded(eager, given)
                assert torch.allclose(result(model, given), result(eager, given), atol=1e-4), (pad, unpad)
        left = batch("left", 0)
        assert torch.allclose(result(model, left), result(eager, left), atol=1e-4)


@pytest.mark.parametrize("cls", [tf.BartForSequenceClassification, tf.T5ForSequenceClassification])
@torch.no_grad()
def test_an_end_after_a_decoder_s_mask_is_read(cls: Any) -> None:
    eager = tiny_of(cls, **ENDS)
    given = batch("right", 0)
    given["input_ids"][0, 8] = given["input_ids"][1, 8] = END
    given["decoder_attention_mask"] = given["attention_mask"]
    model = axattn.apply(copy.deepcopy(eager), "auto")
    assert torch.allclose(result(model, given), result(eager, given), atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "options", "side", "advice"),
    [
        (tf.MistralForSequenceClassification, {"sliding_window": 3}, "right", "Set config.pad_token_id"),
        (tf.CLIPTextModel, ENDS, "left", "padding_side"),
    ],
)
@torch.no_grad()
def test_padding_that_sees_padding_alone_is_refused(cls: Any, options: Any, side: str, advice: str) -> None:
    model = axattn.apply(tiny_of(cls, **options), "auto")
    with pytest.raises(InvalidInputError, match=f"reads padding.*{advice}"):
        model(**batch(side, END))
    assert result(model, batch("right", 0)).isfinite().all()


@torch.no_grad()
def test_on_flash_names_padding_that_a_head_finds_is_refused() -> None:
    model = tiny_of(CAUSAL)
    with hopper("flash_attention_2"):
        axattn.apply(model, "flash_attention_2", upgrade_flash=False)
        with pytest.raises(InvalidInputError, match="reads padding"):
            model(**batch("right", END))
        assert result(model, batch("right", 0)).isfinite().all()


@torch.no_grad()
def test_rows_padded_as_the_config_says_take_no_dense_mask() -> None:
    model = axattn.apply(tiny_of(CAUSAL), "varlen")
    seen: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"].pattern is None), with_kwargs=True
    )
    for side, pad in (("right", 0), ("left", 0), ("left", END), ("right", END)):
        model(**batch(side, pad))
    assert seen == [False, False, False, True]


@torch.no_grad()
def test_a_graph_stops_where_a_head_finds_padding() -> None:
    model = axattn.apply(tiny_of(CAUSAL, num_hidden_layers=1), "auto")
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(result(compiled, batch("right", 0)), result(model, batch("right", 0)), atol=1e-5)
    with pytest.raises(RuntimeError, match=r"that is not config.pad_token_id \(0\), and that is padding"):
        compiled(**batch("right", END))


class Before(tf.LlamaForSequenceClassification):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        logits = self.score(self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state)
        at = torch.eq(input_ids, self.config.pad_token_id).int().argmax(-1) - 1
        return SequenceClassifierOutput(logits=logits[torch.arange(len(logits)), at])


class AsMany(tf.LlamaForSequenceClassification):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        logits = self.score(self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state)
        at = (input_ids != self.config.pad_token_id).sum(-1) - 1
        return SequenceClassifierOutput(logits=logits[torch.arange(len(logits)), at])


class Other(tf.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state)
        at = (input_ids == 96).int().argmax(-1)
        return SequenceClassifierOutput(logits=logits[torch.arange(len(logits)), at])


@pytest.mark.parametrize("cls", [Before, AsMany, Other])
@torch.no_grad()
def test_heads_that_others_wrote_find_their_token_in_other_ways(cls: Any) -> None:
    torch.manual_seed(0)
    config = tiny_of(CAUSAL).config
    eager = cls._from_config(config, attn_implementation="eager").eval()
    model = axattn.apply(copy.deepcopy(eager), "auto")
    for pad in (0, END, 96):
        given = batch("right", pad)
        assert torch.allclose(result(model, given), result(eager, given), atol=1e-5), pad


def test_the_place_of_a_token_is_found_as_the_head_does() -> None:
    model = tiny_of(CAUSAL, **ENDS)
    assert picked(model) == (Pick("last_not_pad"),)
    given = {"input_ids": torch.tensor([[5, END, 9, END, 0, 0], [0, 0, 5, 9, 7, END]])}
    wanted = {"last_not_pad": [3, 5], "before_pad": [3, 5], "as_many": [3, 3], "last_end": [3, 5], "first_end": [1, 5]}
    wanted["largest_id"] = [2, 3]
    for how, places in wanted.items():
        found = column_of(Pick(how), model, given)  # type: ignore[arg-type]  # a literal
        assert found is not None
        assert found.tolist() == places, how
