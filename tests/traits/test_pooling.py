"""Outputs that are not each token's own: heads that classify rows or find answers, poolers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.documents.forward_context import current
from axattn.errors import InvalidInputError, UnsupportedAttentionError
from axattn.traits.pooling import read_at, reads_first
from tests.census.configs import of_class
from tests.fakes.machine import hopper
from tests.models import amplify, build, positions, tokens
from tests.traits.test_token_mixers import made

ROWS = tf.AutoModelForSequenceClassification


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "bert", "albert"])
def test_a_head_with_one_output_a_row_takes_no_packed_rows(model_type: str) -> None:
    """ALBERT's passes all its inputs on, and would have no input hook of its own."""
    model = axattn.apply(made(model_type, ROWS), "auto")
    with pytest.raises(UnsupportedAttentionError, match="one output a row"):
        model(tokens(1, 10), position_ids=positions((4, 6)))
    assert model(tokens(1, 10)).logits.shape == (1, 2)


def tiny_of(cls: Any, **options: Any) -> Any:
    """A tiny model of a class that no auto class makes, on eager attention."""
    torch.manual_seed(0)
    model = cls._from_config(of_class(cls.config_class, "none", options), attn_implementation="eager")
    amplify(model)
    return model.float().eval()


def padded(side: str, end: int = 2) -> dict[str, torch.Tensor]:
    """Two rows, one of seven real tokens of twelve; the last of each row is `end`."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, slice(7, 12) if side == "right" else slice(0, 5)] = 0
    ids = tokens(2, 12) * mask
    ids[0, 6 if side == "right" else 11] = ids[1, 11] = end
    return {"input_ids": ids, "attention_mask": mask}


POOLED = (
    (tf.BertModel, {}, "left"),
    (tf.AlbertModel, {}, "left"),
    (tf.XLMRobertaModel, {}, "left"),
    (tf.EsmModel, {"vocab_size": 97}, "left"),
    (tf.DPRQuestionEncoder, {}, "left"),
    (tf.AltCLIPTextModel, {}, "left"),
    (tf.BertForPreTraining, {}, "left"),
    (tf.RobertaForSequenceClassification, {}, "left"),
    (tf.ElectraForSequenceClassification, {}, "left"),
    (tf.SiglipTextModel, {}, "right"),
    (tf.GPT2DoubleHeadsModel, {}, "right"),
)
"""Models that read a token of each row, whatever stands there, and the side on which it is padding."""


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "varlen"])
@pytest.mark.parametrize(("cls", "options", "side"), POOLED, ids=lambda x: getattr(x, "__name__", None))
def test_padding_that_an_output_is_read_from_is_what_eager_makes_of_it(
    cls: Any, options: Any, side: str, name: str
) -> None:
    """A kernel that leaves padding out gave another ``pooler_output``, and nobody said so."""
    model = tiny_of(cls, **options)
    expected = {way: model(**padded(way), return_dict=True) for way in ("left", "right")}
    axattn.apply(model, name)
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
    seen: list[bool] = []
    norm.register_forward_pre_hook(lambda *_: seen.append(current().reads_padding))
    read = {}
    for way, wanted in expected.items():
        found = model(**padded(way), return_dict=True)
        read[way] = seen[-1]
        real = padded(way)["attention_mask"].bool()
        for key, value in wanted.items():
            if isinstance(value, torch.Tensor):
                pair = (found[key][real], value[real]) if value.shape[:2] == (2, 12) else (found[key], value)
                assert torch.allclose(*pair, atol=2e-5), (way, key)
    other = {"left": "right", "right": "left"}[side]
    assert read[side]
    assert not read[other] or cls is tf.GPT2DoubleHeadsModel  # its summary can be configured to read either end


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("cls", [tf.BertModel, tf.SiglipTextModel])
def test_on_flash_names_it_is_refused(cls: Any, kernel: str) -> None:
    model = tiny_of(cls)
    side, other = ("right", "left") if cls is tf.SiglipTextModel else ("left", "right")
    with hopper(kernel):
        axattn.apply(model, kernel, upgrade_flash=False)
        with pytest.raises(InvalidInputError, match=f"padded on the {side}.*padding_side = .{other}"):
            model(**padded(side))
        assert model(**padded(other)).pooler_output.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("cls", "options"),
    [(tf.ModernBertForSequenceClassification, {"local_attention": 4}), (tf.BertModel, {"is_decoder": True})],
)
def test_padding_that_may_see_padding_alone_is_refused(cls: Any, options: Any) -> None:
    """What such a token attends to is another thing on each of Transformers' own kernels."""
    model = tiny_of(cls, **options)
    left = padded("left")
    expected = model(**left)
    eager = axattn.apply(copy.deepcopy(model), "eager")
    assert torch.equal(eager(**left)[0], expected[0])
    axattn.apply(model, "auto")
    with pytest.raises(InvalidInputError, match="padded on the left"):
        model(**left)
    assert model(**padded("right"))[0].isfinite().all()


@torch.no_grad()
def test_in_a_graph_padding_that_is_read_stops_it() -> None:
    model = axattn.apply(tiny_of(tf.BertModel, num_hidden_layers=1), "auto")
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**padded("right")).pooler_output, model(**padded("right")).pooler_output, atol=1e-5)
    with pytest.raises(RuntimeError, match="BertModel reads the first token of each row, which is padding"):
        compiled(**padded("left"))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("unpad", [False, True])
def test_choices_are_rows_of_their_own(side: str, unpad: bool) -> None:
    """``[B, C, S]``: no input hook sees a batch of that shape, but the one inside of the head."""
    for cls in (tf.BertForMultipleChoice, tf.ElectraForMultipleChoice):
        model = tiny_of(cls)
        given = {key: value[None] for key, value in padded(side).items()}
        expected = model(**given).logits
        assert torch.allclose(axattn.apply(model, "auto", unpad=unpad)(**given).logits, expected, atol=1e-5)


# ---- unpadded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", [tf.BertModel, tf.XLMRobertaModel, tf.EsmModel, tf.BertForPreTraining, tf.ClapTextModel]
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pooler_reads_whole_rows_while_they_run_unpadded(cls: Any, side: str) -> None:
    model = tiny_of(cls, **({"vocab_size": 97} if cls is tf.EsmModel else {}))
    reference = copy.deepcopy(model)
    axattn.apply(model, "auto", unpad=True)
    seen: list[torch.Size] = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layer.0"))
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    given = padded(side)
    real = given["attention_mask"].bool()
    found, expected = model(**given), reference(**given)
    for key, value in expected.items():
        pair = (found[key][real], value[real]) if value.shape[:2] == (2, 12) else (found[key], value)
        assert torch.allclose(*pair, atol=2e-5), key
        assert found[key].shape == value.shape
    assert seen[0][:2] == ((1, 19) if side == "right" else (2, 12))  # padding that is read has to be computed
    last = [key for key in expected if key in ("pooler_output", "seq_relationship_logits")]
    for output in (found, expected):
        output[last[0]].square().sum().backward()
    for (path, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-5 * max(b.grad.abs().max().item(), 1e-2)), path
    handle.remove()
    again = pickle.loads(pickle.dumps(model)) if cls is tf.BertModel else copy.deepcopy(model)
    assert torch.equal(again(**given)[last[0]], found[last[0]])
    axattn.restore(model)
    assert not [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    "cls",
    [tf.AlbertModel, tf.CLIPTextModelWithProjection, tf.SiglipTextModel, tf.DPRContextEncoder, tf.AltCLIPTextModel],
)
def test_a_row_s_output_that_is_read_in_another_way_is_refused_unpadded(cls: Any) -> None:
    """CLIP's was that of the whole flat row: ``[1, D]`` for two texts."""
    with pytest.raises(UnsupportedAttentionError, match="one output a row, read at a fixed place"):
        axattn.apply(tiny_of(cls), "auto", unpad=True)


def test_a_head_that_reads_whole_rows_is_refused_over_a_pooler_too() -> None:
    """No head of Transformers that finds answers has one below: it would take its softmax over zeros for padding."""
    model = tiny_of(tf.BertForQuestionAnswering)
    model.bert = tiny_of(tf.BertModel)
    with pytest.raises(UnsupportedAttentionError, match="one output a row, read at a fixed place"):
        axattn.apply(model, "auto", unpad=True)


class Digesting(tf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output["digest"] = output.logits.sum((1, 2))
        return output


def test_an_output_of_unknown_shape_is_refused_unpadded() -> None:
    model = axattn.apply(Digesting._from_config(build("llama").config), "auto", unpad=True)
    with pytest.raises(UnsupportedAttentionError, match="does not know how to pad its output digest"):
        model(**padded("right"), use_cache=False)


@torch.no_grad()
def test_a_batch_whose_padding_is_read_runs_as_it_is_though_unpad_is_on() -> None:
    eager = tiny_of(tf.GPT2DoubleHeadsModel)
    model = axattn.apply(copy.deepcopy(eager), "auto", unpad=True)
    for side in ("left", "right"):
        given = {**padded(side), "use_cache": False}
        assert torch.allclose(model(**given).mc_logits, eager(**given).mc_logits, atol=2e-5)


def test_labels_of_a_row_take_no_packed_rows() -> None:
    """BERT's next sentence: one label a row, read at its first token."""
    model = axattn.apply(tiny_of(tf.BertForPreTraining), "auto")
    with pytest.raises(UnsupportedAttentionError, match="one output a row"):
        model(tokens(1, 10), position_ids=positions((4, 6)))


# ---- what is read where --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "places"),
    [
        (tf.BertModel, {"first"}),
        (tf.BertForMaskedLM, set()),
        (tf.AlbertModel, {"first"}),
        (tf.LlamaForCausalLM, set()),
        (tf.CLIPTextModel, set()),  # at the token that ends a text, where that stands
        (tf.SiglipTextModel, {"last"}),
        (tf.GPT2DoubleHeadsModel, {"first", "last"}),
        (tf.BertForQuestionAnswering, {"every"}),
        (tf.DistilBertForSequenceClassification, {"first"}),
    ],
)
def test_where_outputs_are_read_is_found_in_the_source(cls: Any, places: set[str]) -> None:
    assert read_at(tiny_of(cls)) == places


def test_a_model_without_its_pooler_reads_no_token_in_particular() -> None:
    """ALBERT picks the token in its own forward."""
    assert read_at(tiny_of(tf.AlbertForMaskedLM).albert) == set()


def test_a_summary_of_the_mean_reads_every_token() -> None:
    assert read_at(tiny_of(tf.GPT2DoubleHeadsModel, summary_type="mean")) == {"every"}


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
    for layer in axattn.status(model).layers:  # the padded rows under a dense mask, the whole ones without
        assert layer.served == {"sdpa": 1, "varlen": 1}


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


@pytest.mark.nightly
@torch.no_grad()
def test_a_compiled_head_reads_padding_too() -> None:
    model, given = answers("llama", "right")
    expected = model(**given).loss
    axattn.apply(model, "auto")
    assert torch.allclose(torch.compile(model, backend="eager")(**given).loss, expected, rtol=1e-6)
