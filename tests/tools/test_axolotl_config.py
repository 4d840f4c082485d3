from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import axattn
from axattn import backends
from axattn.errors import InvalidConfigError, UnsupportedAttentionError
from axattn.machine.environment import Environment
from axattn.planning import capability_docs
from axattn.planning.diagnosis import diagnose
from axattn.spec import names
from axattn.tools.axolotl.config import COMPUTED, AttentionConfig
from tests.environments import CPU, HOPPER, NPU
from tests.models import CONFIGS, build, tokens

LEGACY = sorted(names.LEGACY_FLAGS.items())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quiet(**values: Any) -> AttentionConfig:
    with quietly():
        return AttentionConfig(**values)


def problems(environment: Environment | str | None = None, **values: Any) -> str:
    with quietly(), pytest.raises(ValidationError) as caught:
        AttentionConfig.model_validate(values, context={"environment": environment})
    return str(caught.value)


@pytest.mark.parametrize(("flag", "name"), LEGACY)
def test_a_legacy_flag_maps_to_its_name_warns_and_is_gone(flag: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^{flag} is deprecated; write attn_implementation: {name}$") as said:
        config = AttentionConfig(**{flag: True})
    assert said[0].filename == __file__
    assert config.attn_implementation == name
    assert flag not in config.model_dump()
    assert not hasattr(config, flag)


def test_a_config_says_whether_flash_attention_2_may_run_as_4(tmp_path: Path) -> None:
    assert AttentionConfig().upgrade_flash
    assert AttentionConfig.from_yaml(write(tmp_path, "upgrade_flash:\n")).upgrade_flash
    assert not AttentionConfig.from_yaml(write(tmp_path, "upgrade_flash: false\n")).upgrade_flash


@pytest.mark.parametrize(("flag", "name"), LEGACY)
def test_legacy_flags_are_deprecated_in_the_json_schema(flag: str, name: str) -> None:
    schema = AttentionConfig.model_json_schema()["properties"][flag]
    assert schema["deprecated"] is True
    assert name in schema["description"]


@pytest.mark.parametrize("value", [False, None])
def test_a_legacy_flag_that_is_off_is_harmless(value: bool | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AttentionConfig(attn_implementation="sdpa", flash_attention=value, sage_attention=value)
    assert config.attn_implementation == "sdpa"


def test_several_legacy_flags_follow_the_priority_and_each_warns() -> None:
    order = ["s2", "sage", "xformers", "flex", "flash", "sdp", "eager"]
    flags = [f"{name}_attention" for name in order]
    for at in range(len(flags)):
        with pytest.warns(DeprecationWarning, match="is deprecated") as caught:
            config = AttentionConfig(**dict.fromkeys(reversed(flags[at:]), True))
        assert config.attn_implementation == names.LEGACY_FLAGS[flags[at]]
        said = [str(w.message).split()[0] for w in caught if "_attention is deprecated" in str(w.message)]
        assert sorted(said) == sorted(flags[at:])


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "org/kernel@v1", {"": "sdpa"}])
def test_a_legacy_flag_beside_attn_implementation_is_refused(name: Any) -> None:
    assert "both given" in problems(attn_implementation=name, flash_attention=True)


def test_a_legacy_flag_that_is_no_boolean_is_refused() -> None:
    assert "not true or false" in problems(flash_attention="yes")


@pytest.mark.parametrize("flag", COMPUTED)
def test_giving_a_computed_flag_is_refused(flag: str) -> None:
    assert "is computed" in problems(attn_implementation="varlen", **{flag: True})


@pytest.mark.parametrize("name", [n for n in names.CANONICAL if n not in ("auto", "s2", "sage", "fp8")])
def test_computed_flags_follow_the_name_and_are_dumped(name: str) -> None:
    config = AttentionConfig(attn_implementation=name)
    flags = names.flags(name)
    dumped = config.model_dump()
    assert (config.attn_supports_packing, config.attn_uses_flash_lib, config.attn_needs_dtype_cast) == (
        flags.packing,
        flags.flash_lib,
        flags.dtype_cast,
    )
    assert [dumped[flag] for flag in COMPUTED] == [flags.packing, flags.flash_lib, flags.dtype_cast]


def test_doctor_the_docs_and_a_config_give_one_answer_about_packing() -> None:
    found = diagnose(CPU)
    page = capability_docs.page()
    row = next(line for line in page.splitlines() if line.startswith("| packed documents, by its own name"))
    cells = dict(zip(backends.builtin_names(), [cell.strip() for cell in row.strip("|").split("|")][1:], strict=True))
    for kernel in found.kernels:
        assert cells[kernel.name].replace("-", "no") == kernel.packing
        record = backends.get(kernel.name).capability
        if ":" in kernel.name:
            continue
        config = quiet(attn_implementation=kernel.name)
        assert config.attn_supports_packing is kernel.packs
        assert names.is_native(kernel.name) or record.segments is kernel.packs  # what axattn calls itself: its record
        if kernel.packs:
            assert quiet(attn_implementation=kernel.name, sample_packing=True).collator(64) is not None
    assert {k.name for k in found.kernels if k.packing == "without a cache"} == {"eager", "sdpa", "flex_attention"}
    assert {k["name"] for k in found.to_dict()["kernels"] if not k["packs"]} == {"eager", "sdpa", "s2"}


@pytest.mark.parametrize("name", ["sdpa", "eager", "varlen", "auto"])
def test_a_plan_does_not_change_the_answer_about_packing(name: str) -> None:
    config = AttentionConfig(attn_implementation=name)
    resolved = config.resolve(axattn.plan(CONFIGS["llama"](), name, environment=CPU))
    assert resolved.attn_supports_packing is config.attn_supports_packing


def test_what_the_answer_without_a_cache_says_is_what_happens() -> None:
    model = axattn.apply(build("llama"), "sdpa")
    row, where = tokens(1, 12), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        alone = torch.cat([model(row[:, :5]).logits, model(row[:, 5:]).logits], 1)
        assert torch.allclose(model(row, position_ids=where, use_cache=False).logits, alone, atol=1e-5)
        with pytest.raises(UnsupportedAttentionError, match="use_cache"):
            model(row, position_ids=where, use_cache=True)
        with pytest.raises(UnsupportedAttentionError, match="attention_mask"):
            model(row, position_ids=where, use_cache=False, attention_mask=torch.ones_like(row))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "fa2"),
        ("attn_implementation", 3),
        ("context_parallel_size", -2),
        ("on_unsupported", "x"),
    ],
)
def test_a_bad_value_is_refused_and_an_assignment_of_it_leaves_the_config_as_it_was(key: str, value: Any) -> None:
    assert key in problems(**{key: value})
    config = AttentionConfig(attn_implementation="flash_attention_2", sample_packing=True)
    before = config.model_dump()
    with pytest.raises(InvalidConfigError, match=key):
        setattr(config, key, value)
    assert config.model_dump() == before
    with pytest.raises(InvalidConfigError, match=key):
        AttentionConfig(**{key: value})


def test_an_assignment_is_checked_with_all_other_settings() -> None:
    config = AttentionConfig(attn_implementation="varlen", sample_packing=True)
    with pytest.raises(InvalidConfigError, match="can't pack"):
        config.attn_implementation = "sdpa"
    assert config.attn_supports_packing
    config.sample_packing = False
    config.attn_implementation = "sdpa"
    assert not config.attn_supports_packing
    with quietly():
        config.attn_implementation = "fp8"
    assert config.use_cache is False


def test_a_machine_is_taken_by_its_name(tmp_path: Path) -> None:
    assert "this machine has CPU" in problems("cpu", attn_implementation="flash_attention_3")
    assert "is not a known machine" in problems("sm91", attn_implementation="flash_attention_3")
    AttentionConfig.from_yaml(write(tmp_path, "attn_implementation: flash_attention_3\n"), environment="sm90")
    with pytest.raises(InvalidConfigError, match="can't be read"):
        AttentionConfig.from_yaml(tmp_path / "none.yml")


def test_a_dict_packs_only_if_all_its_names_do() -> None:
    assert AttentionConfig(attn_implementation={"": "varlen", "text_config": "auto"}).attn_supports_packing
    assert not AttentionConfig(attn_implementation={"": "varlen", "vision_config": "sdpa"}).attn_supports_packing


def test_auto_and_none_answer_before_and_after_they_are_resolved() -> None:
    for config in (AttentionConfig(), AttentionConfig(attn_implementation="auto")):
        flags = (config.attn_supports_packing, config.attn_uses_flash_lib, config.attn_needs_dtype_cast)
        assert flags == (True, False, False)
    resolved = AttentionConfig().resolve(axattn.plan(CONFIGS["llama"](), "auto", environment=CPU))
    assert resolved.attn_supports_packing
    assert resolved.attn_needs_dtype_cast  # it became varlen
    resolved = AttentionConfig().resolve(axattn.plan(CONFIGS["gemma2"](), "auto", environment=CPU))
    assert not resolved.attn_needs_dtype_cast  # it became eager, through axattn's masks


@pytest.mark.parametrize("name", ["eager", "sdpa", "s2"])
def test_packing_with_a_name_that_can_not_is_refused(name: str) -> None:
    text = problems(attn_implementation=name, sample_packing=True)
    assert "can't pack" in text
    assert ("without a cache" in text) is (name != "s2")
    assert "write attn_implementation: varlen" in text


def test_packing_with_a_legacy_name_that_can_not_is_refused() -> None:
    assert "can't pack" in problems(sdp_attention=True, sample_packing=True)


def test_packing_with_an_unknown_hub_kernel_is_refused_and_with_a_known_one_accepted() -> None:
    assert "does not know" in problems(attn_implementation="org/kernel", sample_packing=True)
    AttentionConfig(attn_implementation="kernels-community/flash-attn2@v1", sample_packing=True)


def test_s2_is_deprecated_and_for_llama_only() -> None:
    with pytest.warns(DeprecationWarning, match="s2 .* is deprecated"):
        AttentionConfig(attn_implementation="s2", model_type="LlamaForCausalLM")
    assert "LLaMA models only" in problems(attn_implementation="s2", model_type="mistral")
    assert "LLaMA models only" in problems(attn_implementation="s2", model_type="llama4")


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_sage_trains_with_a_true_gradient_and_warns_of_nothing(adapter: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AttentionConfig(attn_implementation="sage", adapter=adapter)


def test_fp8_turns_the_cache_off_and_warns() -> None:
    with pytest.warns(UserWarning, match="use_cache: false"):
        assert AttentionConfig(attn_implementation="fp8").use_cache is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AttentionConfig(attn_implementation="fp8", use_cache=False).use_cache is False


@pytest.mark.parametrize(("name", "fine"), [("flash_attention_2", True), ("varlen", False), (None, False)])
def test_context_parallelism_needs_a_flash_library(name: str | None, fine: bool) -> None:
    if fine:
        AttentionConfig(attn_implementation=name, context_parallel_size=2)
    else:
        assert "context_parallel_size: 2" in problems(attn_implementation=name, context_parallel_size=2)
    AttentionConfig(attn_implementation=name, context_parallel_size=1)


def test_activation_offloading_is_refused_with_flex() -> None:
    assert "activation_offloading" in problems(attn_implementation="flex_attention", activation_offloading=True)
    AttentionConfig(attn_implementation="varlen", activation_offloading=True)


def test_scaling_softmax_needs_flex() -> None:
    assert "scaling_softmax" in problems(attn_implementation="sdpa", scaling_softmax=True)
    AttentionConfig(attn_implementation="flex_attention", scaling_softmax=True)


@pytest.mark.parametrize(
    "values", [{"attn_implementation": "sdpa"}, {"sdp_attention": True}, {"flex_attention": True}, {}]
)
def test_gemma4_hybrid_is_refused_with_anything_but_fa2(values: dict[str, Any]) -> None:
    assert "gemma4_hybrid_attn_impl" in problems(gemma4_hybrid_attn_impl=True, **values)


@pytest.mark.parametrize("values", [{"attn_implementation": "flash_attention_2"}, {"flash_attention": True}])
def test_gemma4_hybrid_is_accepted_with_fa2(values: dict[str, Any]) -> None:
    assert quiet(gemma4_hybrid_attn_impl=True, **values).attn_implementation == "flash_attention_2"


def test_all_problems_are_reported_at_once() -> None:
    text = problems(
        attn_supports_packing=True,
        sdp_attention=True,
        sample_packing=True,
        scaling_softmax=True,
        context_parallel_size=4,
    )
    for part in ("is computed", "can't pack", "scaling_softmax", "context_parallel_size"):
        assert part in text


def test_an_unknown_setting_is_refused() -> None:
    assert "Extra inputs" in problems(attn_impl="sdpa")


def test_the_machine_is_checked_only_when_one_is_given() -> None:
    AttentionConfig(attn_implementation="flash_attention_3")
    assert "needs an NVIDIA GPU" in problems(CPU, attn_implementation="flash_attention_3")
    AttentionConfig.model_validate({"attn_implementation": "flash_attention_3"}, context={"environment": HOPPER})
    for name in ("flash_attention_2", "sdpa", "s2"):
        assert "can't run on this machine" in problems(NPU, attn_implementation=name)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_axolotl_yaml_is_read_and_the_rest_ignored(tmp_path: Path) -> None:
    text = "base_model: org/x\nflash_attention: true\nsample_packing: true\nadapter: lora\n"
    text += "learning_rate: 1e-4\neager_attention:\n"
    with pytest.warns(DeprecationWarning, match="flash_attention is deprecated"):
        config = AttentionConfig.from_yaml(write(tmp_path, text))
    assert config.attn_implementation == "flash_attention_2"
    assert config.adapter == "lora"
    assert config.sample_packing


def test_the_keys_of_the_axolotl_plugin_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    text = "axattn: varlen\naxattn_on_unsupported: route\n"
    for more in ("", "attn_implementation: eager\n", "attn_implementation: varlen\n"):
        config = AttentionConfig.from_yaml(write(tmp_path, text + more))
        assert (config.attn_implementation, config.on_unsupported) == ("varlen", "route")
    with pytest.raises(InvalidConfigError, match=r"axattn: varlen and attn_implementation: sdpa contradict"):
        AttentionConfig.from_yaml(write(tmp_path, text + "attn_implementation: sdpa\n"))
    with pytest.warns(UserWarning, match="axattn_kernel_options: give them to"):
        AttentionConfig.from_yaml(write(tmp_path, "axattn: s2\naxattn_kernel_options: {group_size: 64}\n"))


def test_the_model_type_of_a_yaml_reaches_the_s2_check(tmp_path: Path) -> None:
    with quietly(), pytest.raises(InvalidConfigError, match="LLaMA models only"):
        AttentionConfig.from_yaml(write(tmp_path, "s2_attention: true\ntype_of_model: MistralForCausalLM\n"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "is a list, not a mapping"),
        ("", "is empty, not a mapping"),
        ("just text", "is a str, not a mapping"),
        ("a: [", "is not YAML"),
        ("sdp_attention: true\nsdp_attention: false\n", "line 2: .* sdp_attention is given twice, in line 1"),
        ("a: {b: 1, b: 2}\n", "b is given twice"),
        ("d: 2024-13-45\n", r"config.yaml .* line 1: 2024-13-45 is not a valid date; quote it"),
        ("a: {d: 2024-02-30T10:00:00}\n", "is not a valid date"),
        ("a: !!int x\n", "x is not a valid int"),
        ("? [a]\n: 1\n", "unhashable key"),
        ("a: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
        ("a:\tb\n", "use spaces instead of tabs"),
        ("a: *b\n", "undefined alias"),
        ("a: 1\n---\na: 2\n", "holds 2 YAML documents"),
        ("a: \x07\n", "U\\+0007 is not allowed in YAML"),
        ("flash_atention: true\n", "flash_atention is not a setting; did you mean flash_attention\\?"),
        ("attn-implementation: sdpa\nsample_packin: true\n", "did you mean attn_implementation.*mean sample_packing"),
        ("attn_implementation: sdpa\nsequence_parallel_degree: 2\n", "context_parallel_size: 2 needs a flash"),
        ("attn_implementation: flash_attention_torch\n", "is unknown. Names:"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("attn_implementation: fa2\n", "flash_attention_2"),
        ("attn_uses_flash_lib: true\n", "is computed"),
    ],
)
def test_a_bad_yaml_is_one_clear_error(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(InvalidConfigError, match=part):
        AttentionConfig.from_yaml(write(tmp_path, text))


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="can't be read: No such file"):
        AttentionConfig.from_yaml(tmp_path / "none.yaml")


def test_a_mapping_overrides_what_it_merges(tmp_path: Path) -> None:
    text = "\ufeffbase: &b {attn_implementation: sdpa, lr: 1, self: &s [*s]}\n<<: *b\nattn_implementation: varlen\n"
    assert AttentionConfig.from_yaml(write(tmp_path, text)).attn_implementation == "varlen"


def test_a_yaml_that_is_no_utf_8_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("a: é".encode("latin-1"))
    with pytest.raises(InvalidConfigError, match="is not UTF-8"):
        AttentionConfig.from_yaml(path)


def test_no_code_outside_config_and_names_reads_a_legacy_flag() -> None:
    for path in Path(axattn.__file__).parent.rglob("*.py"):
        if path.name in ("config.py", "names.py"):
            continue
        read = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert not read & (set(names.LEGACY_FLAGS) - {"flex_attention"}), path


@pytest.mark.parametrize(
    ("name", "packing", "drops"),
    [("varlen", True, True), ("varlen", False, False), ("flash_attention_2", True, True), ("sdpa", False, False)],
)
def test_a_packing_loader_drops_the_mask_where_the_kernel_packs(name: str, packing: bool, drops: bool) -> None:
    config = AttentionConfig(attn_implementation=name, sample_packing=packing)
    assert config.sample_packing_drop_attention_mask is drops
    assert "sample_packing_drop_attention_mask" not in config.model_dump()
    collator = config.collator(64, pad_token_id=3)
    assert (collator is not None) is drops
    assert collator is None or (collator.max_length, collator.pad_token_id) == (64, 3)
