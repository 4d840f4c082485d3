from __future__ import annotations

import pytest
import transformers as tf

from axattn.traits.layer_needs import model_needs, sub_configs
from tests.census.configs import tiny
from tests.models import CONFIGS, LAYERS, SMALL, build


def needs_of(family: str) -> list[tuple[str, object]]:
    return [(layer.kind, layer.need) for layer in model_needs(CONFIGS[family]()).layers]


@pytest.mark.parametrize(
    ("model_type", "sparse"),
    [
        ("minimax_m3_vl_text", [False, True]),
        ("minimax_m3_vl_text, full attention alone", [False, False]),
        ("deepseek_v32", [True, True]),
        ("llama", [False, False]),
    ],
)
def test_only_layers_with_an_indexer_select_keys(model_type: str, sparse: list[bool]) -> None:
    assert [layer.need.sparse for layer in model_needs(tiny(model_type)).layers] == sparse


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_sizes_are_those_of_the_real_model(family: str) -> None:
    model = build(family)
    attention = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    layers = model_needs(model.config).layers
    assert len(layers) == len(attention) == 2
    for layer, module in zip(layers, attention, strict=True):
        real = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
        assert layer.need.head_dim == real
        assert layer.need.value_dim == (getattr(module, "v_head_dim", None) or real)
        assert layer.need.causal


def test_features_are_read_from_the_config() -> None:
    sliding, full = (need for _, need in needs_of("gemma2"))
    assert (sliding.window, full.window, sliding.softcap, full.softcap) == (5, None, 2.0, 2.0)
    assert [need.sinks for _, need in needs_of("gpt_oss")] == [True, True]
    assert [need.sinks for _, need in needs_of("llama")] == [False, False]
    assert [need.window for _, need in needs_of("mistral")] == [5, 5]
    assert [(kind, need.chunk) for kind, need in needs_of("llama4")] == [
        ("chunked_attention", 4),
        ("full_attention", None),
    ]
    assert [(need.head_dim, need.value_dim) for _, need in needs_of("deepseek_v3")] == [(16, 12)] * 2
    assert [need.kv_heads for _, need in needs_of("llama")] == [2, 2]


def test_dropout_is_read_from_the_config() -> None:
    assert model_needs(CONFIGS["llama"](attention_dropout=0.1)).layers[0].need.dropout == 0.1


def test_gemma_4_has_two_head_dims() -> None:
    config = tf.Gemma4TextConfig(
        **{**SMALL, "head_dim": 8, "global_head_dim": 16, "sliding_window": 5, "layer_types": LAYERS}
    )
    assert [layer.need.head_dim for layer in model_needs(config).layers] == [8, 16]


def test_encoders_are_bidirectional() -> None:
    bert = tf.BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
    assert not model_needs(bert).layers[0].need.causal
    bert.is_decoder = True
    assert model_needs(bert).layers[0].need.causal


def test_composite_models_are_read_by_sub_config() -> None:
    config = tf.Qwen2_5_VLConfig()
    needs = model_needs(config)
    assert set(needs.paths) == {"", "text_config", "vision_config"}
    causal = {path: {layer.need.causal for layer in needs.layers if layer.path == path} for path in needs.paths}
    assert causal == {"": set(), "text_config": {True}, "vision_config": {False}}
    assert sub_configs(config)[0] == ("", config)


def test_an_unknown_config_is_checked_call_by_call() -> None:
    class Odd(tf.PretrainedConfig):  # type: ignore[misc]
        model_type = "odd"

    needs = model_needs(Odd())
    assert needs.layers == ()
    assert needs.unknown == ("",)


def test_a_model_with_windowed_layers_alone_is_causal() -> None:
    """Its file makes no full causal mask."""
    config = tf.RecurrentGemmaConfig(num_hidden_layers=3)
    assert all(layer.need.causal for layer in model_needs(config).layers)


@pytest.mark.parametrize(
    ("model_type", "causal"),
    [
        ("gpt2", True),  # its file makes masks to both sides for cross-attention alone
        ("gemma4_text", True),  # ... for images and sound
        ("gemma4_text, bidirectional", False),
        ("gemma3_text, bidirectional", False),
        ("gemma2, bidirectional", True),  # on eager the setting does nothing
        ("phi4_multimodal", True),
        ("bert", False),
    ],
)
def test_masks_of_the_class_that_takes_the_config_count_not_those_of_its_file(model_type: str, causal: bool) -> None:
    needs = model_needs(tiny(model_type, "masked" if model_type == "bert" else "causal"))
    assert {layer.need.causal for layer in needs.layers if not layer.path} == {causal}
