from __future__ import annotations

import json

import pytest
import transformers as tf

import axattn
from axattn.errors import BackendUnavailableError, UnknownAttentionError, UnsupportedAttentionError
from axattn.machine.environment import Environment
from axattn.spec.sub_config_names import resolve_names
from tests.environments import AMPERE, CPU, HOPPER, machine
from tests.models import CONFIGS, LAYERS, SMALL


def chosen(family: str, name: str = "auto", environment: Environment = CPU, **kwargs: str) -> list[str]:
    found = axattn.plan(CONFIGS[family](), name, environment=environment, **kwargs)  # type: ignore[arg-type]
    return [layer.chosen for layer in found.layers]


@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        ("llama", "varlen"),
        ("mistral", "varlen"),
        ("llama4", "varlen"),
        ("deepseek_v3", "varlen"),
        ("gemma2", "eager"),
        ("gpt_oss", "varlen"),
    ],
)
def test_auto_takes_the_fastest_exact_kernel_that_serves_each_layer(family: str, kernel: str) -> None:
    assert chosen(family) == [kernel] * 2


def test_why_a_faster_kernel_was_not_taken_is_data() -> None:
    layer = axattn.plan(CONFIGS["gemma2"](), "auto", environment=CPU).layers[0]
    assert [r.backend for r in layer.rejected] == ["varlen", "sdpa"]
    assert all(reason.feature == "softcap" for r in layer.rejected for reason in r.reasons)


def test_a_named_kernel_that_can_not_serve_a_layer_is_refused_with_every_reason() -> None:
    with pytest.raises(UnsupportedAttentionError) as caught:
        chosen("gemma2", "varlen")
    assert "varlen can't serve layers 0, 1 of Gemma2ForCausalLM: softcap=2.0 (varlen has no softcap)" in str(
        caught.value
    )
    assert 'on_unsupported="route"' in str(caught.value)


def test_layers_that_a_kernel_can_not_serve_are_routed_where_asked() -> None:
    assert chosen("gemma2", "varlen", on_unsupported="route") == ["eager", "eager"]
    assert chosen("llama", "varlen", on_unsupported="route") == ["varlen", "varlen"]


def test_a_kernel_that_the_machine_can_not_run_is_refused_or_routed_with_a_note() -> None:
    with pytest.raises(BackendUnavailableError):
        chosen("llama", "flash_attention_2")
    found = axattn.plan(CONFIGS["llama"](), "flash_attention_2", environment=CPU, on_unsupported="route")
    assert found.running == {"": "auto"}
    assert "flash_attention_2 → auto" in found.notes[0]


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
def test_native_names_are_passed_on_verbatim(name: str) -> None:
    assert axattn.plan(CONFIGS["llama"](head_dim=8), name, environment=AMPERE).running == {"": name}


def gemma4(**kwargs: object) -> tf.PretrainedConfig:
    return tf.Gemma4TextConfig(**{**SMALL, "head_dim": 256, "global_head_dim": 512, "layer_types": LAYERS, **kwargs})


def test_a_global_layer_too_wide_for_flash_attention_2_is_found_before_anything_loads() -> None:
    with pytest.raises(UnsupportedAttentionError, match=r"layer 1 .*head_dim=512 .*up to 256"):
        axattn.plan(gemma4(), "flash_attention_2", environment=AMPERE)
    found = axattn.plan(gemma4(), "flash_attention_2", environment=AMPERE, on_unsupported="route")
    assert found.running == {"": "auto"}
    assert [layer.asked for layer in found.layers] == ["flash_attention_2"] * 2


def test_dropout_rules_flash_attention_3_out_but_not_2() -> None:
    config = CONFIGS["llama"](head_dim=64, attention_dropout=0.1)
    axattn.plan(config, "flash_attention_2", environment=HOPPER)
    with pytest.raises(UnsupportedAttentionError, match=r"dropout=0\.1"):
        axattn.plan(config, "flash_attention_3", environment=HOPPER)


def test_sinks_rule_flash_attention_2_out() -> None:
    with pytest.raises(UnsupportedAttentionError, match="sinks"):
        chosen("gpt_oss", "flash_attention_2", AMPERE)


def test_routed_flash_attention_2_has_sinks_because_axattn_calls_it() -> None:
    found = axattn.plan(
        CONFIGS["gpt_oss"](head_dim=64), "flash_attention_2", environment=AMPERE, on_unsupported="route"
    )
    assert found.running == {"": "auto"}
    assert [layer.chosen for layer in found.layers] == ["flash_attention_2"] * 2
    old = machine("cuda", 80, flash_attn="2.7.4")
    found = axattn.plan(CONFIGS["gpt_oss"](head_dim=64), "flash_attention_2", environment=old, on_unsupported="route")
    assert [layer.chosen for layer in found.layers] == ["varlen"] * 2


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_3"])
def test_where_transformers_calls_a_kernel_its_record_has_no_sinks(name: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match="no attention sinks"):
        chosen("gpt_oss", name, HOPPER)


def test_s2_is_for_llama_only() -> None:
    assert chosen("llama", "s2") == ["s2", "s2"]
    for family in ("mistral", "llama4", "qwen3"):
        with pytest.raises(UnsupportedAttentionError, match="LLaMA models only"):
            chosen(family, "s2")


def test_auto_on_a_machine_without_torch_kernels_says_why() -> None:
    with pytest.raises(UnsupportedAttentionError, match="torch is not installed"):
        chosen("llama", "auto", machine(torch=None))


PATHS = ("", "text_config", "text_config.inner", "vision_config")


def test_names_are_resolved_by_path() -> None:
    assert resolve_names("auto", PATHS) == dict.fromkeys(PATHS, "auto")
    found = resolve_names({"": "sdpa", "text_config": "varlen"}, PATHS)
    assert found == {"": "sdpa", "text_config": "varlen", "text_config.inner": "varlen", "vision_config": None}
    found = resolve_names({"text_config": {"": "varlen", "inner": "eager"}}, PATHS)
    assert found == {"": None, "text_config": "varlen", "text_config.inner": "eager", "vision_config": None}


def test_every_unknown_key_is_named_with_the_legal_ones() -> None:
    with pytest.raises(UnknownAttentionError) as caught:
        resolve_names({"txt": "sdpa", "text_config": {"other": "sdpa"}}, PATHS)
    for part in ("'txt'", "'text_config.other'", "'vision_config'"):
        assert part in str(caught.value)


def test_a_plan_is_a_text_and_json() -> None:
    found = axattn.plan(CONFIGS["gemma2"](), "auto", environment=CPU)
    assert "not varlen: softcap=2.0 (varlen has no softcap)" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["chosen"] == "eager"
    assert "layers 0-1" in str(axattn.plan(CONFIGS["llama"](), "auto", environment=CPU))


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match='neither "raise" nor "route"'):
        chosen("llama", "auto", on_unsupported="ignore")


def test_the_native_sdpa_says_what_torch_does_with_it_on_hopper() -> None:
    def notes(name: str, environment: Environment) -> str:
        return " ".join(axattn.plan(CONFIGS["llama"](), name, environment=environment).notes)

    assert "pytorch#196678" in notes("sdpa", HOPPER)
    assert not notes("sdpa", AMPERE)
    said = {kernel.name: kernel.notice for kernel in axattn.diagnose(HOPPER).kernels}
    assert "pytorch#196678" in said["sdpa"]
    assert not said["eager"]
    assert not notes("auto", machine("cuda", 90, **dict.fromkeys(("flash_attn_3", "flash_attn_4"))))
