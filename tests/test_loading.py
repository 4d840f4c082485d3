from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import (
    AxattnError,
    BackendUnavailableError,
    InvalidInputError,
    UnknownAttentionError,
    UnsupportedAttentionError,
)
from axattn.hf.registries import interfaces
from axattn.spec import notices
from tests.conformance.families import FAMILIES
from tests.documents.test_input_hook import qwen_vl
from tests.models import CONFIGS, REFUSED, alone, build, positions, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return path


def snapshot(model: Any) -> dict[str, Any]:
    """Everything about a model that a patch could leave behind."""
    return {
        name: (
            {k for k in vars(module) if not k.startswith("_")} | {k for k in vars(module) if "axattn" in k},
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            len(module._forward_hooks_always_called),
            len(module._forward_pre_hooks_with_kwargs),
        )
        for name, module in model.named_modules()
    } | {"": json.dumps(model.config.to_dict(), default=str) + str(model.config._attn_implementation)}


@pytest.mark.parametrize("name", ["auto", "varlen", "s2", "sdpa", "eager", None])
def test_a_model_is_loaded_on_the_name_asked_for(folder: Path, name: str | None) -> None:
    model = axattn.from_pretrained(folder, attn_implementation=name)
    assert type(model) is tf.LlamaForCausalLM
    assert model.config._attn_implementation == (name or "auto")
    stock = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(model(tokens(1, 9)).logits, stock(tokens(1, 9)).logits, atol=1e-4)
    state, expected = model.state_dict(), stock.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("model_class", [tf.AutoModelForCausalLM, tf.LlamaForCausalLM, tf.AutoModel, tf.LlamaModel])
def test_the_model_class_can_be_chosen(folder: Path, model_class: Any) -> None:
    model = axattn.from_pretrained(folder, attn_implementation="varlen", model_class=model_class)
    assert type(model).__name__ == ("LlamaModel" if "CausalLM" not in model_class.__name__ else "LlamaForCausalLM")
    assert model.config._attn_implementation == "varlen"


def test_keywords_of_transformers_pass_through(folder: Path) -> None:
    model, info = axattn.from_pretrained(
        folder, attn_implementation="varlen", dtype=torch.bfloat16, output_loading_info=True, attention_dropout=0.25
    )
    assert model.dtype == torch.bfloat16
    assert model.config.attention_dropout == 0.25
    assert not info["missing_keys"]
    config = tf.AutoConfig.from_pretrained(folder)
    model = axattn.from_pretrained(folder, config=config, attn_implementation="varlen")
    assert config._attn_implementation != "varlen"
    assert model.config._attn_implementation == "varlen"


def test_the_argument_beats_a_name_inside_config_json(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for hidden in ("eager", "flash_attention_2"):
        config["_attn_implementation"] = hidden
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name in ("varlen", "sdpa"):
            assert axattn.from_pretrained(tmp_path, attn_implementation=name).config._attn_implementation == name


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fa2", UnknownAttentionError),
        ("nonsense", UnknownAttentionError),
        ("sage", BackendUnavailableError),
        ("fp8", BackendUnavailableError),
        ("xformers", BackendUnavailableError),
        ("flash_attention_3", BackendUnavailableError),
        ("someone/kernel", BackendUnavailableError),
        ({"text_config": "varlen"}, UnknownAttentionError),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU some of these names run")
def test_a_name_that_can_not_run_is_refused_before_weights_load(
    folder: Path, name: Any, error: type[AxattnError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tf.PreTrainedModel, "from_pretrained", classmethod(lambda *_, **__: pytest.fail("weights loaded"))
    )
    with pytest.raises(error):
        axattn.from_pretrained(folder, attn_implementation=name)
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(error):
        axattn.apply(model, name)
    assert snapshot(model) == before


@pytest.mark.parametrize("family", sorted(REFUSED))
@pytest.mark.parametrize("name", ["auto", "varlen"])
def test_a_model_outside_the_interface_is_refused_before_weights_load(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAttentionError, match="does not use Transformers' attention interface"):
        axattn.apply(model, name)
    monkeypatch.setattr(
        tf.PreTrainedModel, "from_pretrained", classmethod(lambda *_, **__: pytest.fail("weights loaded"))
    )
    with pytest.raises(UnsupportedAttentionError, match="does not use Transformers' attention interface"):
        axattn.from_pretrained(tmp_path, attn_implementation=name)


def test_a_layer_that_the_kernel_can_not_serve_is_refused_or_routed(tmp_path: Path) -> None:
    build("gemma2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAttentionError, match=r"softcap=2\.0"):
        axattn.from_pretrained(tmp_path, attn_implementation="varlen")
    model = axattn.from_pretrained(tmp_path, attn_implementation="varlen", on_unsupported="route")
    with torch.no_grad():
        model(tokens(1, 9))
    assert [layer.served for layer in axattn.status(model).layers] == [{"eager": 1}] * 2


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_apply_and_restore_leave_no_trace(family: str) -> None:
    model = build(family)
    before, tables = snapshot(model), [dict(table) for table in interfaces()]
    for name in ("auto", "sdpa", "auto"):
        if name == "sdpa" and family in ("gemma2", "gpt_oss"):  # softcap, sinks: sdpa is refused
            name = "eager"  # noqa: PLW2901
        axattn.apply(model, name)
        with torch.no_grad():
            model(tokens(1, 9), position_ids=positions((4, 5)), use_cache=False) if name == "auto" else model(
                tokens(1, 9)
            )
    axattn.prepare_for_training(model)
    axattn.restore(model)
    assert snapshot(model) == before
    assert [dict(table) for table in interfaces()] == tables
    axattn.restore(model)
    assert snapshot(model) == before


def test_apply_and_restore_hold_no_memory() -> None:
    model = build("llama")
    for _ in range(100):
        axattn.apply(model, "varlen")
        axattn.restore(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_a_model_made_on_the_meta_device_is_put_on_auto_there() -> None:
    reference, ids, packed = build("opt"), tokens(1, 7), positions((3, 4))
    with torch.device("meta"):  # a default device, which tensors of axattn would take, too
        model = tf.OPTForCausalLM(CONFIGS["opt"]())
        axattn.apply(model, "auto")
    model.to_empty(device="cpu").load_state_dict(reference.state_dict())
    model.tie_weights()
    found = model.eval()(ids, position_ids=packed, use_cache=False).logits
    torch.testing.assert_close(found, alone(reference, ids, (3, 4)), atol=1e-5, rtol=1e-4)


def test_using_goes_back_to_what_ran_before() -> None:
    model = build("llama")
    with axattn.using(model, "varlen") as inside:
        assert inside is model
        assert model.config._attn_implementation == "varlen"
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    axattn.apply(model, "auto")

    def fail_inside() -> None:
        with axattn.using(model, "eager"):
            assert model.config._attn_implementation == "eager"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert model.config._attn_implementation == "auto"


def test_a_failed_apply_leaves_the_earlier_one_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = axattn.apply(build("llama"), "varlen")
    before = snapshot(model)
    with pytest.raises(AxattnError):
        axattn.apply(model, "fa2")
    assert snapshot(model) == before
    from axattn import loading

    real, calls = loading.add_routes, []

    def fail_once(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(loading, "add_routes", fail_once)
    with pytest.raises(MemoryError):
        axattn.apply(model, "auto")
    assert snapshot(model) == before
    with torch.no_grad():
        model(tokens(1, 9), position_ids=positions((4, 5)))


def test_two_models_in_one_process_do_not_disturb_each_other() -> None:
    a, b = build("llama"), build("llama")
    axattn.apply(a, "varlen")
    assert (a.config._attn_implementation, b.config._attn_implementation) == ("varlen", "sdpa")
    axattn.apply(b, "eager")
    axattn.restore(a)
    assert (a.config._attn_implementation, b.config._attn_implementation) == ("sdpa", "eager")


def test_composite_models_take_a_name_per_sub_config() -> None:
    model = qwen_vl()
    axattn.apply(model, {"text_config": "varlen"})
    running = axattn.status(model).running
    assert running == {"": "sdpa", "text_config": "varlen", "vision_config": "sdpa"}
    axattn.apply(model, {"": "eager", "vision_config": "auto"})
    assert axattn.status(model).running == {"": "eager", "text_config": "sdpa", "vision_config": "auto"}
    with pytest.raises(UnknownAttentionError, match="unknown key 'text'"):
        axattn.apply(model, {"text": "varlen"})
    axattn.restore(model)
    assert axattn.status(model).running == dict.fromkeys(("", "text_config", "vision_config"), "sdpa")


def test_status_distinguishes_asked_from_running_and_counts_calls() -> None:
    model = axattn.apply(build("mistral"), "auto")
    assert "no calls yet" in str(axattn.status(model))
    with torch.no_grad():
        model(tokens(1, 9))
        model(tokens(1, 3))
    status = axattn.status(model)
    assert status.asked == status.running == {"": "auto"}
    assert [(layer.planned, layer.served) for layer in status.layers] == [("varlen", {"varlen": 2})] * 2
    assert status.layers[0].layer == "model.layers.0.self_attn"
    assert status.patches == len(vars(model)["_axattn_state"].patches)
    assert axattn.status(build("llama")).patches == 0


@torch.no_grad()
def test_status_of_a_model_that_transformers_loaded_lists_its_layers_once_they_have_run() -> None:
    model = build("llama")
    model.set_attn_implementation("varlen")
    assert axattn.status(model).layers == ()
    model(tokens(1, 5))
    found = [(layer.layer, layer.planned, layer.served) for layer in axattn.status(model).layers]
    assert found == [(f"model.layers.{i}.self_attn", "varlen", {"varlen": 1}) for i in (0, 1)]
    axattn.apply(model, "auto")
    assert [layer.served for layer in axattn.status(model).layers] == [{}, {}]


def test_a_call_that_the_planned_kernel_can_not_serve_is_routed_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:

    notices._given.clear()
    model = axattn.apply(build("llama"), "auto")
    attention = model.model.layers[0].self_attn
    with caplog.at_level(logging.WARNING, "axattn"):
        for _ in range(2):
            from axattn.attention.interface import attend

            q = torch.randn(1, 4, 5, 8)
            kv = torch.randn(1, 2, 5, 8)
            attend("auto", attention, q, kv, kv, None, position_bias=torch.zeros(1, 4, 5, 5))
    assert len(caplog.records) == 1
    assert "runs on sdpa instead of varlen: bias" in caplog.text


def test_what_is_saved_loads_in_stock_transformers(tmp_path: Path) -> None:
    model = axattn.apply(build("llama"), "varlen")
    axattn.prepare_for_training(model)
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()
    stock = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(stock(tokens(1, 9)).logits, model(tokens(1, 9)).logits, atol=1e-5)


def test_something_without_a_transformers_model_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="holds no Transformers model"):
        axattn.apply(torch.nn.Linear(1, 1), "varlen")


@pytest.mark.parametrize("kind", ["model", "config", "folder"])
def test_a_plan_needs_no_weights(kind: str, folder: Path) -> None:
    source = {"model": build("llama"), "config": CONFIGS["llama"](), "folder": str(folder)}[kind]
    assert [layer.chosen for layer in axattn.plan(source).layers] == ["varlen", "varlen"]


def test_a_name_set_by_transformers_alone_still_keeps_documents_apart() -> None:
    """No input hook: the interface reads documents from the keywords that Transformers passes to every layer."""
    model = build("llama")
    model.set_attn_implementation("varlen")
    with torch.no_grad():
        found = model(tokens(1, 9), position_ids=positions((4, 5)), use_cache=True).logits
        alone = torch.cat([model(tokens(1, 9)[:, :4]).logits, model(tokens(1, 9)[:, 4:]).logits], 1)
    assert torch.allclose(found, alone, atol=1e-5)


@torch.no_grad()
def test_t5_whose_stacks_have_configs_of_their_own_really_runs_through_axattn() -> None:
    model = FAMILIES["t5"].make()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens(2, 6, 3)}
    before = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    with axattn.using(model, "eager"):
        expected = model(**inputs).logits
        written = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    axattn.apply(model, "auto")
    assert torch.allclose(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    layers = axattn.status(model).layers
    assert len(layers) == 6
    assert all(layer.served for layer in layers)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), written)
    axattn.restore(model)
    after = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert after == before
