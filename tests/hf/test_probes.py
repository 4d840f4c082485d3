"""A run of a model's code: it shows what the source says, answers where there is none, is heeded where they differ.

``AXATTN_PROBES=all`` compares every architecture of the installed Transformers, not a sample.
"""

from __future__ import annotations

import copy
import functools
import os
import zlib
from typing import Any, Literal

import pytest
import torch
import transformers as tf
from transformers.models.bert.modeling_bert import BertPooler
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

import axattn
from axattn.errors import UnsupportedAttentionError
from axattn.hf import probes, trial
from axattn.hf.skeleton import Projection, Shape, Skeleton
from axattn.hf.source_inspection import source_of
from axattn.parallel.checks import reasons_against as parallel_reasons
from axattn.traits import losses, pooling, position_ids, token_mixers
from tests.census import examine
from tests.census.configs import HEADS, tiny
from tests.models import alone, amplify, build, positions, tokens
from tests.traits.test_pooling import padded, tiny_of
from tests.unpadding.test_unpadded_forward import batch

EVERYTHING = os.environ.get("AXATTN_PROBES") == "all"
LENGTHS = (5, 4, 3)


# ---- source and run ------------------------------------------------------------------------------------------------

SHOWN = {
    "mra": "positions start at 2",  # a buffer of them does, and nothing in a forward says so
    "nystromformer": "positions start at 2",
    "yoso": "positions start at 2",
    "falcon": "ignores them",  # its heads drop position_ids, but for the one that predicts tokens
    "perceiver": "every token that is not padding",
}
"""Where the source says something else, and why; none of them runs through Transformers' attention interface."""


def _sampled(head: str, model_type: str) -> bool:
    if EVERYTHING or model_type == "perceiver":  # five seconds to build
        return EVERYTHING
    chosen = model_type in {*SHOWN, "bert", "roberta", "opt", "llama", "gpt2", "esm, token dropout", "mobilebert"}
    return chosen or zlib.crc32(f"{head} {model_type}".encode()) % 12 == 0


def _built(head: str, model_type: str) -> Any:
    try:
        return getattr(tf, HEADS[head][1]).from_config(tiny(model_type, head))
    except Exception:  # sizes that do not fit, an optional library: the census says which
        return None


@pytest.mark.parametrize("head", [head for head in HEADS if EVERYTHING or head != "seq2seq"])
def test_a_run_of_an_architecture_shows_what_its_source_says(head: str) -> None:
    answered = dict.fromkeys(("loss", "position_counting", "token_mixing"), 0)
    asked = 0
    for model_type in [name for one, name in examine.every() if one == head and _sampled(one, name)]:
        model = _built(head, model_type)
        if model is None or model.config.is_encoder_decoder:  # nothing is packed there
            continue
        with trial.shared_skeletons():
            text = token_mixers.text_model(model)
            found = [*losses.contradictions(model), *position_ids.contradictions(text), *pooling.contradictions(model)]
            found += [one for one in token_mixers.mixers(model, by_document=True) if "the source says" in one.text]
            answers = {
                "loss": probes.loss(model),
                "position_counting": probes.position_counting(text),
                "token_mixing": probes.token_mixing(model),
            }
        wanted = SHOWN.get(model_type)
        assert not found or (wanted is not None and all(wanted in one.text for one in found)), (model_type, found)
        asked += 1
        for name, answer in answers.items():
            answered[name] += answer is not None
    assert asked > 3 or head == "seq2seq"
    assert min(answered["position_counting"], answered["token_mixing"]) >= 0.5 * asked
    assert answered["loss"] >= (0.5 * asked if head in ("causal", "masked", "vision") else 0)


def test_a_token_that_is_masked_is_seen_to_change_the_others() -> None:
    answers = [probes.token_mixing(_built("none", model_type)) for model_type in ("esm", "esm, token dropout")]
    assert [answer is not None and answer.tokens for answer in answers] == [False, True]


@pytest.mark.parametrize("model_type", ["mra", "nystromformer", "yoso", "falcon"])
def test_what_only_a_run_shows_is_found(model_type: str) -> None:
    model = _built("tokens", model_type)
    assert [SHOWN[model_type] in one.text for one in position_ids.unread_positions(model)] == [True]


# ---- source that can't be read -------------------------------------------------------------------------------------


def made(text: str, like: Any) -> Any:
    """A class made of a text that nobody can read again, in the module of another class."""
    found: dict[str, Any] = {"__name__": like.__module__, "torch": torch, "tf": tf}
    exec(compile(text, "<made>", "exec"), found)
    cls = found["Made"]
    assert source_of(cls.forward) == ""
    return cls


def put_in(model: Any, cls: type, part: str = "") -> Any:
    """The model, or a part of it, as an instance of a class."""
    model.get_submodule(part).__class__ = cls
    return model


HEAD = """
from transformers.modeling_outputs import CausalLMOutputWithPast
entropy = torch.nn.functional.cross_entropy
class Made(tf.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = {loss}
        return CausalLMOutputWithPast(loss=loss, logits=logits)
"""
OWN = "entropy(logits.flatten(0, 1), labels.flatten())"
NEXT = "entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())"
GIVEN = "self.loss_function(logits, labels, self.config.vocab_size, **kwargs)"


@pytest.mark.parametrize(
    ("loss", "answer"),
    [(OWN, (False, False)), (NEXT, (True, False)), (GIVEN, (True, True))],
    ids=["own", "next", "given"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_loss_without_a_source_is_what_a_run_shows(loss: str, answer: tuple[bool, bool], side: str) -> None:
    model = put_in(build("llama"), made(HEAD.format(loss=loss), tf.LlamaForCausalLM))
    assert (losses.predicts_next(model), losses.takes_keywords(model)) == answer
    assert not losses.contradictions(model)
    given = batch(side)
    expected = model(**given).loss
    axattn.apply(model, "varlen", unpad=True)
    assert torch.allclose(model(**given, use_cache=False).loss, expected, atol=1e-5)


EMBEDDINGS = """
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings
class Made(RobertaEmbeddings):
    def forward(self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, *args, **kwargs):
        if position_ids is None:
            real = input_ids.ne(self.padding_idx).long()
            position_ids = {count}
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        return self.LayerNorm(hidden)
"""
FAIRSEQ = "real.cumsum(-1) * real + self.padding_idx"
ALONG = "torch.arange(4, 4 + input_ids.shape[1]).expand(input_ids.shape)"


def roberta(cls: Any) -> Any:
    torch.manual_seed(0)
    config = tiny("roberta", "masked")
    config.pad_token_id = 1
    model = tf.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    amplify(model)
    return put_in(model, cls, "roberta.embeddings")


@torch.no_grad()
def test_positions_without_a_source_are_what_a_run_shows() -> None:
    model = roberta(made(EMBEDDINGS.format(count=FAIRSEQ), RobertaEmbeddings))
    assert position_ids.first_position(model) == 2
    assert not position_ids.unread_positions(model)
    ids = tokens(1, sum(LENGTHS))
    expected = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    axattn.apply(model, "varlen")
    assert torch.allclose(model(ids, position_ids=positions(LENGTHS) + 2).logits, expected, atol=1e-4)


def test_an_unknown_way_of_counting_positions_is_refused() -> None:
    """From 4 along the row, where tokens of padding are counted as any: `count_positions` has no such way."""
    model = roberta(made(EMBEDDINGS.format(count=ALONG), RobertaEmbeddings))
    model.roberta.embeddings.padding_idx = model.config.pad_token_id = 3
    assert "in an unknown way" in position_ids.unread_positions(model)[0].text


POOLER = """
class Made(torch.nn.Module):
    def forward(self, hidden_states):
        return self.activation(self.dense(hidden_states{picked}))
"""


@torch.no_grad()
def test_a_pooler_without_a_source_reads_what_a_run_shows() -> None:
    model = put_in(tiny_of(tf.BertModel), made(POOLER.format(picked=".unbind(1)[0]"), tf.BertModel), "pooler")
    assert pooling.read_at(model) == {"first"}
    assert pooling.first_token_pooler(model) is model.pooler
    expected = {side: model(**padded(side)).pooler_output for side in ("left", "right")}
    axattn.apply(model, "auto", unpad=True)
    for side, wanted in expected.items():
        assert torch.allclose(model(**padded(side)).pooler_output, wanted, atol=2e-5)


def test_a_pooler_without_a_source_that_takes_the_mean_is_refused_unpadded() -> None:
    model = put_in(tiny_of(tf.BertModel), made(POOLER.format(picked=".mean(1)"), tf.BertModel), "pooler")
    assert pooling.read_at(model) == {"every"}
    with pytest.raises(UnsupportedAttentionError, match="one output a row, read at a fixed place"):
        axattn.apply(model, "auto", unpad=True)


CLASSIFIER = """
from transformers.modeling_outputs import SequenceClassifierOutput
class Made(tf.BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(hidden{picked}))
"""


@torch.no_grad()
@pytest.mark.parametrize(
    ("picked", "answer"),
    [("[:, 0]", (True, False)), ("[range(len(hidden)), attention_mask.cumsum(1).argmax(1)]", (False, True))],
)
def test_a_head_without_a_source_reads_what_a_run_shows(picked: str, answer: tuple[bool, bool]) -> None:
    cls = made(CLASSIFIER.format(picked=picked), tf.BertModel)
    model = put_in(tiny_of(tf.BertForSequenceClassification), cls)
    assert (pooling.reads_first(model), pooling.reads_last(model)) == answer
    expected = model(**padded("right")).logits
    axattn.apply(model, "auto", unpad=True)
    assert torch.allclose(model(**padded("right")).logits, expected, atol=2e-5)


# ---- source and run that disagree ----------------------------------------------------------------------------------


class SaysNextForCausalLM(tf.LlamaForCausalLM):
    """Its text speaks of labels that are shifted, and it shifts none."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        shift_labels = labels
        kwargs.pop("return_dict", None)
        hidden = self.model(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        logits = self.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten())
        return tf.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class DropsKeywordsForCausalLM(tf.LlamaForCausalLM):
    """It passes the loss keywords, of which none is left."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        logits, kwargs = self.lm_head(hidden), {}
        loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return tf.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize(
    ("cls", "source", "run"),
    [
        (SaysNextForCausalLM, "labels are those of the next token", "labels are each token's own"),
        (DropsKeywordsForCausalLM, "its loss takes shift_labels", "its loss does not take them all"),
    ],
)
def test_unpadded_rows_are_refused_where_the_loss_is_not_what_the_source_says(cls: Any, source: str, run: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match=f"the source says that {source}.* a run of its code .* {run}"):
        axattn.apply(put_in(build("llama"), cls), "varlen", unpad=True)


class CountsFromFive(RobertaEmbeddings):
    """The name of fairseq's count, and another count."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is None:
            position_ids = self.create_position_ids_from_input_ids(input_ids, self.padding_idx)
        return self.word_embeddings(input_ids) + self.position_embeddings(position_ids)

    @staticmethod
    def create_position_ids_from_input_ids(input_ids: Any, padding_idx: int) -> Any:
        return torch.arange(5, 5 + input_ids.shape[1]).expand(input_ids.shape)


class IgnoresPositions(CountsFromFive):
    """Takes them for nothing."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        position_ids = self.create_position_ids_from_input_ids(input_ids, self.padding_idx)
        return self.word_embeddings(input_ids) + self.position_embeddings(position_ids)


class LooksBack(CountsFromFive):
    """Each token with the one before it."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        hidden = self.word_embeddings(input_ids)
        return hidden + hidden.roll(1, 1)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (CountsFromFive, "positions start at 2, and a run of its code on a few tokens that positions start at 5"),
        (IgnoresPositions, "it takes position_ids, and a run of its code on a few tokens that it ignores them"),
        (LooksBack, "only its layers mix tokens, and a run of its code on a few tokens that something before"),
    ],
)
def test_packed_and_unpadded_rows_are_refused_where_embeddings_are_not_what_the_source_says(
    cls: Any, words: str
) -> None:
    with pytest.raises(UnsupportedAttentionError, match=f"the source says that {words}"):
        axattn.apply(roberta(cls), "varlen", unpad=True)
    model = axattn.apply(roberta(cls), "varlen")
    ids = tokens(1, sum(LENGTHS))
    with pytest.raises(UnsupportedAttentionError, match=f"the source says that {words}"):
        model(ids, position_ids=positions(LENGTHS) + 8)
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: put_in(build("llama"), DropsKeywordsForCausalLM), "its loss takes shift_labels"),
        (lambda: roberta(CountsFromFive), "positions start at 2"),
    ],
)
def test_such_rows_are_not_split_over_ranks(model: Any, words: str) -> None:
    applied = axattn.apply(model(), "varlen")
    strategies: tuple[Literal["ulysses", "fetch"], ...] = ("ulysses", "fetch")
    for strategy in strategies:
        reasons = parallel_reasons(applied, 2, strategy)
        assert sum(f"the source says that {words}" in one.text for one in reasons) == 1


class FlippedPooler(BertPooler):
    """The first token of each row turned round."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        turned = hidden_states.flip(1)
        return self.activation(self.dense(turned[:, 0]))


@torch.no_grad()
def test_packed_and_unpadded_rows_are_refused_where_a_pooler_reads_another_token_than_its_source_says() -> None:
    words = "the first token of a row is read, and a run of its code on a few tokens that the last token of a row is"
    model = put_in(tiny_of(tf.BertModel), FlippedPooler, "pooler")
    eager = copy.deepcopy(model)
    with pytest.raises(UnsupportedAttentionError, match=words):
        axattn.apply(copy.deepcopy(model), "auto", unpad=True)
    axattn.apply(model, "auto")
    with pytest.raises(UnsupportedAttentionError, match=words):
        model(tokens(1, 10), position_ids=positions((4, 6)))
    assert pooling.read_at(model) == {"first", "last"}  # padding at either end is taken for read
    for side in ("left", "right"):
        assert torch.allclose(model(**padded(side)).pooler_output, eager(**padded(side)).pooler_output, atol=2e-5)


# ---- what a run leaves behind, and costs ---------------------------------------------------------------------------


def test_a_run_uses_no_random_numbers_and_leaves_nothing_on_the_model() -> None:
    model = put_in(build("llama"), made(HEAD.format(loss=f"{OWN} + 0 * torch.rand(())"), tf.LlamaForCausalLM)).train()
    expected = probes.loss(model), probes.position_counting(model), probes.token_mixing(model)
    trial.KEPT.clear()
    seen: list[Any] = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    model.requires_grad_(False)
    state, before = torch.get_rng_state(), [set(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        answers = probes.loss(model), probes.position_counting(model), probes.token_mixing(model)
    assert answers == expected
    assert None not in answers
    assert torch.equal(torch.get_rng_state(), state)
    assert [set(vars(module)) for module in model.modules()] == before
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not seen
    assert model.training
    assert (model.config._attn_implementation, model.config.pad_token_id) == ("sdpa", 0)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_without_weights_answers_as_one_that_has_them(family: str) -> None:
    """A vocabulary of 128 256 words costs nothing: logits are made of the first few."""
    model = build(family)
    config = copy.deepcopy(model.config)
    config.vocab_size, config.eos_token_id, config.pad_token_id = 128_256, 128_009, None
    with torch.device("meta"):
        large = tf.AutoModelForCausalLM.from_config(config)
    small, big = ([probe(one) for probe in (probes.loss, probes.token_mixing)] for one in (model, large))
    assert small == big
    assert None not in big
    first, other = probes.position_counting(model), probes.position_counting(large)
    assert first is not None
    assert other is not None
    assert (first.first, first.padded) == (other.first, other.padded)


def test_models_that_are_alike_are_asked_once() -> None:
    calls: list[int] = []

    @trial.question
    def asked(skeleton: Skeleton) -> bool:
        calls.append(1)
        return True

    model = build("llama")
    assert asked(model)
    assert asked(copy.deepcopy(model))
    assert asked(build("llama", seed=1))
    assert len(calls) == 1
    asked(build("llama", rope_theta=7.0))
    asked(build("mistral"))
    assert len(calls) == 3
    for number in range(2):
        model.loss_function = functools.partial(print, number)
        asked(model)
        assert len(calls) == 4 + number


def test_one_skeleton_serves_for_all_questions_while_models_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[Any] = []

    class Counted(Skeleton):
        def __init__(self, model: Any) -> None:
            made_of.append(model)
            super().__init__(model)

    monkeypatch.setattr(trial, "Skeleton", Counted)
    model = build("llama")
    with trial.shared_skeletons():
        assert None not in (probes.loss(model), probes.position_counting(model), probes.token_mixing(model))
    assert made_of == [model]
    model.config.pad_token_id = 5
    probes.loss(model)
    assert made_of == [model, model]


def test_after_a_run_that_fails_the_source_alone_decides() -> None:
    class Fails(tf.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            weight = self.lm_head.weight @ self.lm_head.weight.T
            return self.loss_function(weight, labels, **kwargs)

    model = put_in(build("llama"), Fails)
    assert (probes.loss(model), probes.position_counting(model), probes.token_mixing(model)) == (None, None, None)
    assert losses.predicts_next(model)
    assert not losses.contradictions(model)
    assert position_ids.first_position(model) == 0


def test_no_forward_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not the first one: all is known when a model is put on a kernel."""
    model = axattn.apply(build("llama"), "varlen", unpad=True)
    monkeypatch.setattr(trial, "Skeleton", None)
    given = batch("right")
    assert model(**given, use_cache=False).loss.isfinite()


def test_a_skeleton_runs_nothing_of_the_model() -> None:
    """Neither layers nor what attributes lead to: a module in a list, a bound method."""
    model = build("llama")
    model.kept = [model.model.layers[0]]
    model.bound = model.model.layers[0].forward
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    skeleton = Skeleton(model)
    assert not list(skeleton.root.model.layers)
    assert not isinstance(skeleton.root.kept, list)
    with pytest.raises(TypeError):
        skeleton.root.bound(torch.ones(1, 1, 32))
    assert skeleton.root(tokens(1, 4)).logits.isfinite().all()


def test_a_weight_of_which_there_is_only_the_shape_computes_nothing() -> None:
    weight = Projection(4, 6, False).weight
    assert isinstance(weight, Shape)
    assert (weight.shape, weight.dtype, weight.ndim) == ((6, 4), torch.float32, 2)
    with pytest.raises(TypeError, match="matmul of a weight that has no values in a skeleton"):
        torch.matmul(torch.ones(2, 6), weight)


@torch.no_grad()
def test_packed_rows_are_the_documents_alone_where_source_and_run_agree() -> None:
    model = build("opt")
    ids = tokens(1, sum(LENGTHS))
    expected = alone(model, ids, LENGTHS)
    axattn.apply(model, "varlen")
    assert torch.allclose(model(ids, position_ids=positions(LENGTHS), use_cache=False).logits, expected, atol=1e-4)
