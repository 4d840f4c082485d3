"""``unpad=True``: a padded batch as one packed row; outputs, losses and gradients of the padded run at real tokens."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.integrations.neftune import neftune_post_forward_hook

import axattn
from axattn.spec import notices
from axattn.traits import token_mixers
from tests.census import examine
from tests.documents.test_input_hook import qwen_vl
from tests.e2e.test_trainer import corpus, padded, train
from tests.models import CONFIGS, HYBRIDS, build, positions, tokens
from tests.sampling import part_of

LENGTHS = (12, 5, 9)
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def batch(side: str, labels: bool = True) -> dict[str, torch.Tensor]:
    """Three rows of at most twelve tokens, padded on a side; labels at real tokens but for the first of each row."""
    ids = tokens(3, 12)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, length) if side == "right" else slice(12 - length, 12)] = 1
    if side == "holes":
        mask[0, 3:5] = 0
    given = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if labels:
        first = mask.argmax(-1)
        given["labels"] = ids.masked_fill(mask == 0, -100)
        given["labels"][torch.arange(3), first] = -100
    return given


def both(family: str, name: str = "auto") -> tuple[Any, Any]:
    return axattn.apply(build(family), name, unpad=True), axattn.apply(build(family), name)


class Sizes:
    """Tokens that the layers of a model saw."""

    def __init__(self, model: Any) -> None:
        self.seen: list[torch.Size] = []
        layers = model.model.layers if hasattr(model.model, "layers") else model.model.decoder.layers
        layers[0].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append((args[0] if args else kwargs["hidden_states"]).shape)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
def test_outputs_loss_and_gradients_are_those_of_the_padded_run(family: str, side: str) -> None:
    model, reference = both(family)
    sizes, given = Sizes(model), batch(side)
    found, expected = model(**given), reference(**given, use_cache=False)
    assert sizes.seen[0][:2] == (1, sum(LENGTHS))
    real = given["attention_mask"].bool()
    assert found.logits.shape == expected.logits.shape
    assert torch.allclose(found.logits[real], expected.logits[real], atol=1e-4)
    assert not found.logits[~real].any()
    assert torch.allclose(found.loss, expected.loss, rtol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for (path, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-5 * max(b.grad.abs().max().item(), 1e-2)), path


def test_gradients_come_through_the_outputs_too() -> None:
    model, reference = both("llama")
    given = batch("right", labels=False)
    real = given["attention_mask"].bool()
    for one in (model, reference):
        one(**given, use_cache=False).logits[real].square().mean().backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5 * b.grad.abs().max().item())


def test_rows_that_are_packed_and_padded_keep_their_documents() -> None:
    model, reference = both("llama")
    given = batch("right") | {"position_ids": positions((4, 8), (5, 7), (3, 6, 3))}
    found, expected = model(**given), reference(**given, use_cache=False)
    real = given["attention_mask"].bool()
    assert torch.allclose(found.logits[real], expected.logits[real], atol=1e-4)
    assert torch.allclose(found.loss, expected.loss, rtol=1e-5)


def test_a_mask_of_document_ids_is_flattened_with_its_documents() -> None:
    model, reference = both("llama")
    mask = torch.tensor([[1] * 4 + [2] * 6 + [0] * 2, [1] * 3 + [2] * 4 + [3] * 5])
    given = {"input_ids": tokens(2, 12), "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        found, expected = model(**given).logits, reference(**given).logits
    assert torch.allclose(found[mask > 0], expected[mask > 0], atol=1e-4)


@torch.no_grad()
def test_what_has_no_padding_or_a_cache_runs_as_it_is() -> None:
    model, reference = both("llama")
    sizes, ids = Sizes(model), tokens(2, 8)
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, reference(ids).logits)
    assert {tuple(size[:2]) for size in sizes.seen} == {(2, 8)}
    given = batch("left", labels=False)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given, **options), reference.generate(**given, **options))
    after = model(**given)  # without a word a cache comes back, of whole rows: decoding may go on from it
    nxt = tokens(3, 1)
    mask = torch.cat([given["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    found = model(nxt, attention_mask=mask, past_key_values=after.past_key_values).logits
    expected = reference(nxt, attention_mask=mask, past_key_values=reference(**given).past_key_values).logits
    assert torch.equal(found, expected)
    holes = batch("holes", labels=False) | {"use_cache": False}
    real = holes["attention_mask"].bool()
    assert torch.allclose(model(**holes).logits[real], reference(**holes).logits[real], atol=1e-4)
    assert sizes.seen[-1][:2] == (3, 12)


@torch.no_grad()
def test_outputs_come_as_asked() -> None:
    model, reference = both("llama")
    given = batch("right")
    real = given["attention_mask"].bool()
    as_tuple, expected = model(**given, return_dict=False), reference(**given, use_cache=False, return_dict=False)
    assert torch.allclose(as_tuple[1][real], expected[1][real], atol=1e-4)
    hidden = model(**given, output_hidden_states=True).hidden_states
    wanted = reference(**given, use_cache=False, output_hidden_states=True).hidden_states
    assert all(torch.allclose(a[real], b[real], atol=1e-4) for a, b in zip(hidden, wanted, strict=True))
    base, plain = axattn.apply(build("llama").model, "varlen", unpad=True), build("llama").model
    inputs = batch("left", labels=False)
    seen = inputs["attention_mask"].bool()
    mine, theirs = base(**inputs, use_cache=False).last_hidden_state, plain(**inputs).last_hidden_state
    assert torch.allclose(mine[seen], theirs[seen], atol=1e-4)
    embeds = {"inputs_embeds": model.model.embed_tokens(given["input_ids"]), "attention_mask": given["attention_mask"]}
    assert torch.allclose(model(**embeds, use_cache=False).logits[real], expected[1][real], atol=1e-4)


def test_token_labels_that_are_not_shifted_stay_where_they_are() -> None:
    torch.manual_seed(0)
    config = CONFIGS["llama"](num_labels=3)
    stock = tf.LlamaForTokenClassification(config).eval()
    model = axattn.apply(copy.deepcopy(stock), "varlen", unpad=True)
    given = batch("right")
    given["labels"] = given["labels"].masked_fill(given["labels"] >= 0, 1)
    assert torch.allclose(model(**given).loss, stock(**given).loss, rtol=1e-5)


def test_targets_that_padding_predicts_are_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    notices._given.clear()
    model, reference = both("llama")
    given = batch("left")
    real = given["attention_mask"].bool()
    given["labels"] = given["input_ids"].masked_fill(~real, -100)  # the first real token too
    with caplog.at_level(logging.WARNING, "axattn"):
        found = model(**given).loss
    assert "leaves out 2 targets" in caplog.text
    given["labels"][~torch.nn.functional.pad(real[:, :-1], (1, 0))] = -100
    assert torch.allclose(found, reference(**given, use_cache=False).loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: build("llama"), "sdpa", "is called by Transformers"),
        (lambda: build("llama"), "s2", "s2 does not pack"),
        (lambda: build("minimax"), "auto", "outside of attention"),
        (qwen_vl, "auto", "images or audio"),
        (lambda: build("llama4", no_rope_layers=[1, 0]), "auto", "counts positions"),
        (
            lambda: tf.AlbertModel(tf.AlbertConfig(**TINY)),
            "auto",
            "one output",
        ),
        (
            lambda: tf.T5ForConditionalGeneration(tf.T5Config(d_model=32, num_layers=1)),
            "auto",
            "encoder-decoder",
        ),
    ],
)
def test_models_that_can_t_be_flattened_are_refused_and_left_alone(make: Any, name: str, reason: str) -> None:
    model = make()
    before = dict(vars(model))
    with pytest.raises(axattn.UnsupportedAttentionError, match=reason):
        axattn.apply(model, name, unpad=True)
    assert vars(model).keys() == before.keys()


def test_batches_that_can_t_be_flattened_are_refused() -> None:
    model, _ = both("llama")
    given = batch("right")
    for extra, reason in (
        ({"pixel_values": torch.ones(1)}, "pixel_values: axattn does not know how to unpad it"),
        ({"output_attentions": True}, "weights would be those"),
        ({"logits_to_keep": 1}, "logits_to_keep counts"),
    ):
        with pytest.raises(axattn.InvalidInputError, match=reason):
            model(**given, **extra)
    assert model(**given).loss.isfinite()


def test_it_is_copied_pickled_restored_and_kept_by_using() -> None:
    model, reference = both("llama")
    given = batch("right")
    expected = reference(**given, use_cache=False).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sizes = Sizes(other)
        assert torch.allclose(other(**given).loss, expected, rtol=1e-5)
        assert sizes.seen[0][:2] == (1, sum(LENGTHS))
    with axattn.using(model, "varlen"):
        assert "forward" not in vars(model)
    assert "forward" in vars(model)
    axattn.restore(model)
    assert "forward" not in vars(model)


def test_trainer_with_padded_batches_follows_eager(tmp_path: Path) -> None:
    stock = build("llama")
    stock.set_attn_implementation("eager")
    _, expected = train(tmp_path / "a", stock, padded)
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "auto", unpad=True))
    sizes = Sizes(model)
    _, found = train(tmp_path / "b", model, padded)
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(size[0] == 1 for size in sizes.seen)
    assert len(corpus()) == 32


def test_a_lora_model_is_flattened_too() -> None:
    peft = pytest.importorskip("peft")
    losses = []
    for unpad in (True, False):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(axattn.apply(build("llama"), "varlen", unpad=unpad), lora)
        sizes = Sizes(model.base_model.model)
        losses.append(model(**batch("right")).loss)
        assert (sizes.seen[0][0] == 1) is unpad
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)


def test_from_pretrained_takes_it(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = axattn.from_pretrained(tmp_path, attn_implementation="auto", unpad=True)
    sizes = Sizes(model)
    model(**batch("right"))
    assert sizes.seen[0][:2] == (1, sum(LENGTHS))


def test_hybrids_are_known() -> None:
    assert all(token_mixers.mixers(build(family)) for family in HYBRIDS)


@torch.no_grad()
def test_a_compiled_model_runs_its_padded_rows() -> None:
    model, reference = both("llama")
    given = batch("right")
    real = given["attention_mask"].bool()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(**given).logits[real], reference(**given).logits[real], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("what", part_of(["graph break", "inner model", "layers"], kept=["layers"]))
def test_parts_of_it_compiled_run_unpadded_or_padded_but_right(what: str) -> None:
    torch._dynamo.reset()
    model, reference = (
        axattn.apply(build("llama", num_hidden_layers=1), "auto", unpad=unpad) for unpad in (True, False)
    )
    given = batch("right")
    real = given["attention_mask"].bool()
    expected = reference(**given).logits[real]
    runs: Any = model
    if what == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    elif what == "inner model":
        model.model.compile(backend="eager")
        model(tokens(1, sum(LENGTHS)), use_cache=False)  # the same shape, one document
    else:
        model.model.layers[0].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        runs = torch.compile(model, backend="eager")
    assert torch.allclose(runs(**given).logits[real], expected, atol=1e-4)


def test_a_model_that_adds_tokens_of_its_own_is_missed() -> None:
    """Documents described for the flat row fit no other: read again from positions, rows could run into each other."""
    model, _ = both("llama")
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"input_ids": torch.nn.functional.pad(kwargs["input_ids"], (1, 0))}),
        with_kwargs=True,
        prepend=True,
    )
    with pytest.raises(axattn.InvalidInputError, match="the unpadded row has"):
        model(**batch("right"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "varlen"])
def test_without_a_head_rows_are_kept_apart_too(name: str) -> None:
    """No inner model has an input hook of its own, and positions alone say that these two rows are one document."""
    model = axattn.apply(build("llama").model, name, unpad=True)
    given = batch("right", labels=False)
    given["position_ids"] = torch.arange(12).expand(3, 12).clone()
    given["position_ids"][1] += 12
    given["position_ids"][2] += 12 + LENGTHS[1]
    expected = axattn.apply(build("llama").model, name)(**given, use_cache=False).last_hidden_state
    real = given["attention_mask"].bool()
    assert torch.allclose(model(**given, use_cache=False).last_hidden_state[real], expected[real], atol=1e-4)


# ---- heads that read one token of a row ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt", "roberta", "distilbert", "bert"])
def test_under_a_head_that_reads_one_token_of_each_row_all_else_is_unpadded(model_type: str, side: str) -> None:
    reference, model = examine.build(model_type, "rows"), examine.build(model_type, "rows")
    encoder = model_type in ("roberta", "distilbert", "bert")
    axattn.apply(model, "auto", unpad=True)
    seen: list[torch.Size] = []
    norm = next(module for module in model.modules() if type(module).__name__.endswith("Norm"))
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    given = batch(side, labels=False) | {"labels": torch.tensor([0, 1, 1])}
    expected, found = reference(**given), model(**given)
    assert seen[0][:2] == ((3, 12) if side == "left" and encoder else (1, sum(LENGTHS)))  # what is read is computed
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    expected.loss.backward()
    found.loss.backward()
    for (path, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-5 * max(b.grad.abs().max().item(), 1e-2)), path
    axattn.restore(model)
    assert not [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("model_type", "head"), [("albert", "rows"), ("modernbert", "rows"), ("llama", "questions")])
def test_heads_that_read_more_than_that_stay_refused(model_type: str, head: str) -> None:
    model = examine.build(model_type, head)
    if model_type == "modernbert":
        model.config.classifier_pooling = "mean"
    with pytest.raises(axattn.UnsupportedAttentionError, match="one output a row, read at a fixed place"):
        axattn.apply(model, "auto", unpad=True)


def test_noise_that_depends_on_the_length_of_a_row_is_refused() -> None:
    """NEFTune: the flat row is longer than each of its rows, and would get less noise."""
    model = axattn.apply(build("llama"), "varlen", unpad=True).train()
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    with pytest.raises(axattn.InvalidInputError, match="NEFTune scales its noise"):
        model(**batch("right"))
    assert model.eval()(**batch("right")).loss.isfinite()  # no noise in evaluation
    del embeddings.neftune_noise_alpha
    handle.remove()
    assert model.train()(**batch("right")).loss.isfinite()


def fused_head(model: Any) -> None:
    """As TRL's trainers (1.16) and Liger put theirs: a loss from the hidden states of the inner model."""
    original = model.forward

    def forward(self: Any, *args: Any, fused: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused:
            return original(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        logits = self.get_output_embeddings()(hidden).transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:])

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("order", ["before", "after", "applied again"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_a_replaced_forward_runs_unpadded_and_stays(family: str, order: str) -> None:
    model, reference = build(family).train(), axattn.apply(build(family), "auto").train()
    if order != "before":
        axattn.apply(model, "auto", unpad=True)
    fused_head(model)
    fused_head(reference)
    if order == "before":
        axattn.apply(model, "auto", unpad=True)
    elif order == "applied again":
        with axattn.using(model, "varlen"):
            assert model(**batch("left"), fused=True).isfinite()
    sizes, theirs = Sizes(model), vars(model)["forward"]
    given = batch("left")
    found, expected = model(**given, fused=True), reference(**given, fused=True)
    assert torch.allclose(found, expected, rtol=1e-5)
    found.backward()
    expected.backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert b.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5 * max(b.grad.abs().max().item(), 1e-2))
    assert torch.allclose(model(**given).loss, reference(**given).loss, rtol=1e-5)
    assert {tuple(size[:2]) for size in sizes.seen} == {(1, sum(LENGTHS))}
    axattn.restore(model)
    if order == "before":
        assert vars(model)["forward"] is theirs
    assert torch.allclose(model(**given, fused=True), expected, rtol=1e-4)
    assert tuple(sizes.seen[-1][:2]) == (3, 12)


def test_a_forward_that_bypasses_every_input_hook_is_refused() -> None:
    model = axattn.apply(build("llama"), "auto", unpad=True).train()
    for one in (model, model.model):
        one.forward = types.MethodType(type(one).forward, one)
    assert model(tokens(2, 8)).logits.shape == (2, 8, 97)  # nothing to take out
    with pytest.raises(axattn.UnsupportedAttentionError, match="this batch would not run unpadded, despite unpad=True"):
        model(**batch("left"))
    axattn.restore(model)
    assert not model.model.layers[0].self_attn._forward_pre_hooks
    assert model(**batch("left")).loss.isfinite()


def test_router_logits_come_back_in_their_places() -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model, reference = (axattn.apply(build("mixtral", **sizes), "auto", unpad=unpad).train() for unpad in (True, False))
    for given in (batch("left"), batch("right")):
        for part in ("", "model"):
            inputs = {key: x for key, x in given.items() if key != "labels" or not part}
            found, expected = (one.get_submodule(part)(**inputs) for one in (model, reference))
            real = given["attention_mask"].bool().flatten()
            for a, b in zip(found.router_logits, expected.router_logits, strict=True):
                assert torch.allclose(a[real], b[real], atol=1e-5)
            if not part:
                assert torch.allclose(found.loss, expected.loss, rtol=1e-5)
                assert torch.allclose(found.aux_loss, expected.aux_loss, rtol=1e-5)


def test_wrappers_of_accelerate_run_the_input_hook() -> None:
    import accelerate
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model, reference = both("llama")
    sizes, given = Sizes(model), batch("left")
    for one in (model, model.model):
        add_hook_to_module(one, AlignDevicesHook(execution_device="cpu"))
    expected = reference(**given).loss
    assert torch.allclose(model(**given).loss, expected, rtol=1e-5)
    for one in (model, model.model):
        remove_hook_from_module(one)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's, in this process
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    assert torch.allclose(accelerator.prepare(model)(**given).loss, expected, rtol=1e-2)
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.allclose(unwrapped(**given).loss, expected, rtol=1e-5)
    assert {tuple(size[:2]) for size in sizes.seen} == {(1, sum(LENGTHS))}


def test_hooks_that_take_gradients_by_row_are_refused_and_others_are_warned_of_flat_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = axattn.apply(build("llama"), "auto", unpad=True).train()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, logger="axattn"):
        model(**batch("left"))
        model(**batch("left"))
    said = [record.getMessage() for record in caplog.records if "hooks on" in record.getMessage()]
    assert len(said) == 1
    assert "model.layers.0.mlp and 1 more see [1, N, ...]" in said[0]
    monkeypatch.setitem(sys.modules, "opacus", types.ModuleType("opacus"))
    wrapper = torch.nn.Module()
    wrapper.inner = model
    wrapper.forward = model.__call__  # type: ignore[method-assign]
    for one in (model, wrapper):
        assert wrapper(**batch("left")).loss.isfinite()
        monkeypatch.setattr(one, "autograd_grad_sample_hooks", [], raising=False)
        with pytest.raises(axattn.InvalidInputError, match="Opacus takes a gradient for each index of dim 0"):
            wrapper(**batch("left"))
        assert wrapper(tokens(2, 8)).logits.shape == (2, 8, 97)
        monkeypatch.delattr(one, "autograd_grad_sample_hooks")


@torch.no_grad()
def test_documents_that_a_users_hook_describes_are_counted_anew() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = tf.BertModel(tf.BertConfig(vocab_size=97, **sizes)).eval()
    ids, document_ids = tokens(2, 9), torch.tensor([[1] * 5 + [2] * 4, [1] * 6 + [0] * 3])
    expected = torch.cat([model(ids[:1, :5])[0], model(ids[:1, 5:])[0], model(ids[1:, :6])[0]], 1)
    axattn.apply(model, "auto", unpad=True)
    model.register_forward_pre_hook(lambda _, a, k: (a, {**k, "attention_mask": document_ids}), with_kwargs=True)
    out = model(ids)[0]
    assert torch.allclose(torch.cat([out[:1], out[1:, :6]], 1), expected, atol=1e-5)
