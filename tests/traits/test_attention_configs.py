"""Attention modules that read a config of their own: as right as the others, refused by name, put back exactly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import axattn
from axattn.errors import UnsupportedAttentionError
from axattn.hf.model_internals import CONFIG_NAME
from axattn.tools.verify.modules import verify_modules
from tests.conformance.families import FAMILIES
from tests.fakes.machine import hopper
from tests.models import build, positions, tokens

IDS = tokens(1, 12)
LAYERS = ["full_attention", "sliding_attention"]


def layer_of(model: Any, index: int = -1) -> Any:
    return model.get_decoder().layers[index]


def replicated(model: Any) -> Any:
    return peft_model(model, layer_replication=[[0, 2], [0, 2]], target_modules=["q_proj"])


def saved(model: Any) -> Any:
    return peft_model(model, modules_to_save=["self_attn"], target_modules=["gate_proj"])


def peft_model(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


def layer_copied(model: Any) -> Any:
    layers = model.model.layers
    layers[1] = copy.deepcopy(layers[0])
    layers[1].self_attn.layer_idx = 1
    return model


def config_exchanged(model: Any) -> Any:
    model.config = copy.deepcopy(model.config)
    return model


def inner_config_exchanged(model: Any) -> Any:
    model.model.config = copy.deepcopy(model.config)
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    one.__name__: one for one in (replicated, saved, layer_copied, config_exchanged, inner_config_exchanged)
}


def mistral(loaded: str) -> Any:
    model = build("mistral", sliding_window=4)
    model.set_attn_implementation(loaded)
    return model


def snapshot(model: Any) -> dict[str, Any]:
    """By module: its attributes, its hooks, and what its config says."""
    return {
        name: (
            sorted(key for key in vars(module) if "axattn" in key or key == "forward"),
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks.values()),
            *(
                vars(module)["config"].__dict__.get(key)
                for key in (CONFIG_NAME, "use_cache")
                if "config" in vars(module)
            ),
        )
        for name, module in model.named_modules()
    }


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("loaded", "name"), [("eager", "sdpa"), ("eager", "varlen"), ("sdpa", "auto"), ("sdpa", "flash_attention_2")]
)
def test_a_copy_of_a_config_is_switched_and_put_back(change: str, loaded: str, name: str) -> None:
    wanted = CHANGES[change](mistral("eager"))(input_ids=IDS).logits
    model = CHANGES[change](mistral(loaded))
    before = snapshot(model)
    with hopper("flash_attention_2"):
        axattn.apply(model, name)
        found = model(input_ids=IDS).logits
        status = axattn.status(model)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert not status.apart
    if name in ("varlen", "auto"):
        assert sum(sum(layer.served.values()) for layer in status.layers) == len(layer_names(model))
        assert len({layer.layer for layer in status.layers}) == len(status.layers)
        packed = model(input_ids=IDS, position_ids=positions((5, 7))).logits[:, 5:]
        torch.testing.assert_close(packed, model(input_ids=IDS[:, 5:]).logits, atol=1e-5, rtol=0)
    axattn.restore(model)
    assert snapshot(model) == before


def layer_names(model: Any) -> list[Any]:
    return list(model.get_decoder().layers)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["varlen", "sdpa", "flash_attention_2"])
def test_what_comes_as_a_copy_after_apply_runs_and_is_put_back(change: str, name: str) -> None:
    wanted = CHANGES[change](mistral("eager"))
    before = snapshot(wanted)
    with hopper("flash_attention_2"):
        model = axattn.prepare_for_training(axattn.apply(mistral("eager"), name))
        model = CHANGES[change](model)
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted(input_ids=IDS).logits, atol=1e-5, rtol=0)
        axattn.restore(model)
    assert snapshot(model) == before
    assert torch.equal(model(input_ids=IDS).logits, wanted(input_ids=IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["varlen", "eager", "sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("own", ["varlen", "eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_a_layer_put_in_later_on_another_name_is_right_or_refused_by_name(name: str, own: str) -> None:
    wanted = mistral("eager")(IDS).logits
    with hopper("flash_attention_2"):
        model = axattn.apply(mistral("eager"), name)
        if "flex_attention" not in (name, own):  # which compiles for seconds
            model(IDS)
        attention = copy.deepcopy(layer_of(model).self_attn)
        attention.config._attn_implementation = own
        layer_of(model).self_attn = attention
        right = own in (name, "varlen") or (own == "sdpa" and name in ("eager", "varlen"))
        assert dict(axattn.status(model).apart) == ({} if own == name else {"model.layers.1.self_attn": own})
        if not right:
            with pytest.raises(UnsupportedAttentionError, match=rf"{name} can't serve layers.1.self_attn .*'{own}'"):
                model(IDS)
            if name == "varlen":
                assert {check.outcome for check in verify_modules(model)} == {"ok", "wrong"}
            axattn.apply(model, name)
            assert not axattn.status(model).apart
        if "flex_attention" not in (name, own):
            torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_names_and_configs_exchanged_later_are_seen() -> None:
    model = axattn.apply(replicated(mistral("eager")), "sdpa")
    attention = layer_of(model).self_attn
    attention.config._attn_implementation = "eager"
    with pytest.raises(UnsupportedAttentionError, match=r"layers.3.self_attn"):
        model(input_ids=IDS)
    attention.config = model.base_model.model.config
    model(input_ids=IDS)
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"
    with pytest.raises(UnsupportedAttentionError, match=r"layers.3.self_attn"):
        model(input_ids=IDS)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_layer_on_sdpa_is_refused_where_sdpa_would_drop_what_it_asks_for(family: str) -> None:
    model = axattn.apply(build(family), "varlen", on_unsupported="route")
    attention = layer_of(model).self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedAttentionError, match=r"layers.1.self_attn"):
        model(IDS)


@torch.no_grad()
def test_a_graph_is_made_and_refused_alike() -> None:
    torch._dynamo.reset()
    model = axattn.apply(layer_copied(mistral("eager")), "sdpa")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
    layer_of(model).self_attn.config._attn_implementation = "eager"
    with pytest.raises(UnsupportedAttentionError, match=r"layers.1.self_attn"):
        torch.compile(model, backend="eager")(IDS)


def test_the_plan_has_the_needs_of_a_layer_s_own_config() -> None:
    model = build("mistral", sliding_window=4)
    attention = layer_of(model).self_attn
    attention.config = copy.deepcopy(model.config)
    attention.config.sliding_window = 7
    windows = [(entry.layer.index, entry.layer.need.window) for entry in axattn.plan(model, "varlen").layers]
    assert windows == [(0, 4), (1, 4), (1, 7)]
    assert {entry.layer.index for entry in axattn.plan(replicated(build("mistral"))).layers} == {0, 1, 2, 3}


def test_a_copied_tower_follows_its_own_sub_config() -> None:
    model = FAMILIES["gemma3_vl"].make()
    model.model.vision_tower = copy.deepcopy(model.model.vision_tower)
    axattn.apply(model, {"text_config": "varlen", "vision_config": "sdpa"})
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    axattn.apply(model, {"text_config": "sdpa", "vision_config": "varlen"})
    assert model.model.vision_tower.config._attn_implementation == "varlen"
    assert {layer.layer.partition(".layers")[0] for layer in axattn.status(model).layers} == {
        "model.vision_tower.encoder"
    }


def picklable(model: Any) -> bool:
    """Stock models are not on transformers 5.17: their rotary functions are local classes."""
    try:
        return bool(pickle.dumps(model))
    except AttributeError:
        return False


@torch.no_grad()
def test_models_and_layers_are_copied_alone() -> None:
    with hopper("flash_attention_2"):
        model = axattn.apply(saved(mistral("sdpa")), "flash_attention_2")
        wanted = model(input_ids=IDS).logits
        others = [copy.deepcopy(model)]
        if picklable(saved(mistral("sdpa"))):
            others.append(pickle.loads(pickle.dumps(model)))
        for other in others:
            torch.testing.assert_close(other(input_ids=IDS).logits, wanted)
            axattn.restore(other)
            assert layer_of(other).self_attn.original_module.config._attn_implementation == "sdpa"
        first = layer_of(model, 0).self_attn
        assert first.modules_to_save.default._forward_pre_hooks  # what runs is guarded, not what it is a copy of alone
        copied: dict[int, Any] = {}
        copy.deepcopy(first, copied)
        assert id(first.original_module) in copied
        assert id(model.get_decoder()) not in copied
