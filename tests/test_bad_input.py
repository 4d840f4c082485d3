"""What can't be is one error of axattn, at once: configs, folders, names, models, batches; JSON where that is asked."""

from __future__ import annotations

import inspect
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import axattn
from axattn import parallel
from axattn.cli import app
from axattn.documents.collator import PackingCollator
from axattn.errors import AxattnError, InvalidConfigError, InvalidInputError, UnknownAttentionError
from tests.models import CONFIGS, build

runner = CliRunner()
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": tf.LlamaConfig(**SMALL, num_key_value_heads=2).to_dict(),
    "mistral": tf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8).to_dict(),
    "gemma2": tf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8).to_dict(),
    "qwen2": tf.Qwen2Config(**SMALL, num_key_value_heads=2).to_dict(),
    "bert": tf.BertConfig(**SMALL).to_dict(),
    "t5": tf.T5Config(vocab_size=64, d_model=32, d_kv=8, num_layers=2, num_heads=4).to_dict(),
}
IMPOSSIBLE: dict[str, list[Any]] = {
    "num_attention_heads": [0, -1, "4", 2.5, float("nan"), True, {}],
    "num_key_value_heads": [0, -2, "2", 3, 8, float("inf")],
    "head_dim": [0, -8, "8", 2.5, True, float("nan"), [8]],
    "hidden_size": [-32, 3, "32"],
    "sliding_window": [-1, "8", 2.5, [8]],
    "num_hidden_layers": [-1, "2", 1.5, 10**12],
    "attention_dropout": [-1, float("nan"), "x", 2],
    "architectures": [3, [3], {"a": 1}],
    "model_type": [None, [], 3, "nope"],
}


def write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_a_config_with_a_value_that_can_not_be_names_it(tmp_path: Path, key: str, value: Any) -> None:
    family = {"attention_dropout": "llama", "sliding_window": "mistral"}.get(key, "qwen2")
    with pytest.raises(InvalidConfigError, match=rf"{key}|model type") as caught:
        axattn.plan(write(tmp_path, {**FAMILIES[family], key: value}))
    assert "\n" not in str(caught.value)


VALUES = [None, 0, -1, 3, 4, "4", "x", [], [4], {}, True, 2.5, float("nan"), float("inf"), ["full_attention", 3], 10**9]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_a_config_changed_at_random_is_planned_or_refused(family: str, data: st.DataObject) -> None:
    values = dict(FAMILIES[family])
    attention = [
        key for key in values if any(part in key for part in ("head", "size", "layer", "window", "type", "d_"))
    ]
    keys = st.sampled_from(sorted({*attention, "head_dim", "sliding_window", "num_key_value_heads", "rope_parameters"}))
    for key in data.draw(st.lists(keys, min_size=1, max_size=3)):
        values[key] = data.draw(st.sampled_from(VALUES))
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = axattn.plan(write(Path(folder), values))
        except AxattnError:
            return
    for entry in found.layers:
        need = entry.layer.need
        assert all(isinstance(n, int) and n > 0 for n in (need.heads, need.kv_heads, need.head_dim)), need
        assert need.heads is not None and need.kv_heads is not None and need.heads % need.kv_heads == 0  # noqa: PT018
        assert need.window is None or need.window > 0


def test_a_width_that_its_heads_do_not_divide_is_the_model_class_s_to_refuse(tmp_path: Path) -> None:
    uneven = {"hidden_size": 32, "num_attention_heads": 3, "num_key_value_heads": 3}
    assert axattn.plan(write(tmp_path, {**FAMILIES["qwen2"], **uneven})).layers  # 3 heads of 10 run in Transformers
    config = tf.Qwen2Config(**{**SMALL, **uneven})
    with torch.no_grad():
        assert tf.Qwen2ForCausalLM(config)(torch.arange(4)[None]).logits.isfinite().all()
    with pytest.raises(InvalidConfigError, match="hidden size"):
        axattn.plan(write(tmp_path, {**FAMILIES["bert"], "num_attention_heads": 3}))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_no_config_that_runs_is_refused(family: str) -> None:
    axattn.plan(CONFIGS[family]())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("null", "is null"),
        ("[1]", "is a list"),
        ('"x"', "is a str"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
        (None, "has no config.json"),
    ],
)
def test_a_folder_with_no_config_is_refused_everywhere(tmp_path: Path, content: str | None, part: str) -> None:
    if content is not None:
        write(tmp_path, content)
    for load in (axattn.plan, axattn.from_pretrained, axattn.verify):
        with pytest.raises(AxattnError, match=part):
            load(tmp_path)
    if content is not None:
        with pytest.raises(AxattnError, match=part):
            axattn.plan(tmp_path / "config.json")


def test_a_folder_says_what_is_in_it_instead(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    write(tmp_path / "checkpoint-2", FAMILIES["llama"])
    with pytest.raises(InvalidInputError, match="checkpoint-2"):
        axattn.from_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="weights of"):
        axattn.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(InvalidInputError, match="is a file, not the folder"):
        axattn.from_pretrained(tmp_path / "checkpoint-2" / "config.json")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(InvalidInputError, match=r"holds an adapter .* Load org/base"):
        axattn.from_pretrained(tmp_path)


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize(
    "name", ["./nowhere", "../x/y", "/nowhere/x", "~/x", "a/b/c", "x.json", "a b", "x/", "", Path("./n")]
)
def test_a_path_that_leads_nowhere_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch, name: str | Path) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", never)
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", never)
    monkeypatch.chdir("/")
    with pytest.raises(InvalidInputError, match=r"no such folder|no config\.json"):
        axattn.plan(name)


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def away(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", away)
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", never)
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(InvalidInputError, match=r"no such folder: 'models/x' \(models exists\): the hub can't be"):
        axattn.plan("models/x")
    assert time.monotonic() - start < 5


def test_a_hub_that_answers_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)

    def gated(*args: Any, **kwargs: Any) -> Any:
        raise OSError("You are trying to access a gated repo.\nAsk for access.")

    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", gated)
    with pytest.raises(InvalidInputError, match=r"org/x can't be loaded: You are .* gated repo\. Ask for access\."):
        axattn.plan("org/x")


def use(model: Any) -> None:
    with axattn.using(model, "auto"):
        pass


FUNCTIONS: list[Callable[[Any], Any]] = [
    lambda model: axattn.apply(model, "auto"),
    axattn.restore,
    axattn.status,
    use,
    axattn.prepare_for_training,
    lambda model: axattn.sequence_parallel(model, None),
]


@pytest.mark.parametrize(
    "model", ["my-model", None, 3, tf.LlamaForCausalLM, CONFIGS["llama"]()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_loaded_model_is_refused(function: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"is not a model that is loaded.*from_pretrained"):
        function(model)


@pytest.mark.parametrize("source", [None, 3, [], {}, tf.LlamaForCausalLM, b"x"], ids=repr)
@pytest.mark.parametrize("load", [axattn.plan, axattn.from_pretrained, axattn.verify])
def test_what_is_no_name_is_refused(load: Callable[[Any], Any], source: Any) -> None:
    with pytest.raises(InvalidInputError, match="from a folder or a hub name"):
        load(source)


@pytest.mark.parametrize(
    "options",
    [
        {"on_unsupported": "x"},
        {"on_unsupported": None},
        {"on_unsupported": ["raise"]},
        {"kernel_options": "x"},
        {"kernel_options": [1]},
        {"kernel_options": {"group_size": "x"}},
        {"kernel_options": {"group_size": np.ones(2)}},
        {"kernel_options": {1: 2}},
    ],
)
def test_a_bad_option_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = axattn.apply(build("llama"), "varlen")
    before = (dict(vars(model)), model.config._attn_implementation)
    with pytest.raises(InvalidConfigError):
        axattn.apply(model, "s2", **options)
    assert (dict(vars(model)), model.config._attn_implementation) == before
    with pytest.raises(InvalidConfigError):
        axattn.plan(model, "s2", **options)


def test_a_bad_provider_of_any_type_is_refused() -> None:
    for value in (3, None, [], np.ones(2), "x"):
        with pytest.raises(InvalidConfigError, match="is not one of"):
            axattn.plan(CONFIGS["llama"](), "sage", environment="sm90", kernel_options={"provider": value})


def test_a_machine_is_taken_by_its_name_and_no_other_is() -> None:
    assert axattn.plan(CONFIGS["llama"](), environment="sm90").environment.sm == 90
    assert axattn.diagnose("sm90").environment.sm == 90
    for value in ("sm91", "", 3, {}):
        for ask in (lambda v: axattn.plan(CONFIGS["llama"](), environment=v), axattn.diagnose):
            with pytest.raises(InvalidConfigError, match="sm90"):
                ask(value)


@pytest.mark.parametrize(
    "cls", ["LlamaForCausalLM", "x", 3, tf.LlamaConfig, tf.AutoConfig, dict, torch.nn.Linear], ids=str
)
def test_a_model_class_that_is_none_is_refused(tmp_path: Path, cls: Any) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"not a model class.*model_class=transformers\."):
        axattn.from_pretrained(tmp_path, model_class=cls)


@pytest.mark.parametrize(
    "batch", ["abc", b"abc", None, 3, {}, {"input_ids": [1]}, [1], ["a"], [None], [{"input_ids": None}]]
)
def test_a_batch_that_is_no_list_of_examples_is_refused(batch: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"batch|example"):
        PackingCollator()(batch)


@pytest.mark.parametrize(
    "ids",
    [
        *("abc", 3, 1.5, [1.5], [1.0], ["a"], [None, 1], [[1]], {1, 2}, [float("nan")], [torch.ones(1)]),
        *(torch.ones(2, 2), torch.ones(2), torch.tensor(3), np.ones(2, dtype=np.float32)),
    ],
)
@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_a_feature_that_is_no_flat_list_of_whole_numbers_is_refused(key: str, ids: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"example 1: {key} is not a flat list of integers: it (is|holds) "):
        PackingCollator()([{"input_ids": [1, 2]}, {"input_ids": [1, 2], key: ids}])


@pytest.mark.parametrize(
    "ids", [(4, 5), np.array([4, 5]), torch.tensor([4, 5]), list(torch.tensor([4, 5])), range(4, 6)]
)
def test_whole_numbers_of_any_kind_are_taken(ids: Any) -> None:
    masks = {"attention_mask": torch.ones(2), "completion_mask": np.array([True, True])}
    assert PackingCollator()([{"input_ids": ids, **masks}])["input_ids"].tolist() == [[4, 5]]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"max_length": 8, "pad_token_id": None}, "pad_token_id=None is no token. .*eos_token_id"),
        ({"pad_to_multiple_of": 8, "pad_token_id": None}, "pad_token_id=None is no token"),
        ({"max_length": 8, "pad_token_id": [1, 2]}, "pad_token_id"),
        ({"pad_token_id": "0"}, "pad_token_id"),
        ({"max_length": 8, "pad_token_id": -1}, "pad_token_id=-1"),
        ({"max_length": "8"}, "max_length='8'"),
        ({"max_length": 8.0}, "max_length"),
        ({"max_length": -8}, "max_length=-8"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of=-8"),
        ({"first_position": None}, "first_position=None"),
        ({"too_long": []}, "too_long"),
    ],
)
def test_a_collator_s_arguments_are_checked_when_it_is_made(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidConfigError, match=part):
        PackingCollator(**arguments)
    assert PackingCollator(pad_token_id=None)([{"input_ids": [1, 2]}])["input_ids"].shape == (1, 2)  # nothing to fill


@pytest.mark.parametrize("size", [-2, 0, "2", 2.0, None, True])
def test_ranks_are_whole_numbers(size: Any) -> None:
    with pytest.raises(InvalidInputError, match="integers of 1 or more"):
        parallel.accelerate_config(size)
    with pytest.raises(InvalidInputError, match="integers of 1 or more"):
        parallel.estimate(CONFIGS["llama"](), 64, size)


def test_an_unknown_name_is_refused_before_a_benchmark_loads_anything() -> None:
    from axattn.tools.bench.steps import bench_step

    with pytest.raises(UnknownAttentionError, match="nope"):
        bench_step(None, ["auto", "nope"])
    with pytest.raises(InvalidInputError, match="list of shapes"):
        axattn.bench("1,2,2,8,8")  # type: ignore[arg-type]  # what is tested


VERBS = {
    "doctor": (["--require", "nope"], 1),
    "plan": (["./nowhere"], 1),
    "verify": (["./nowhere"], 1),
    "bench": (["./nowhere", "--model-step", "--attn", "nope"], 1),
    "migrate": (["./nowhere", "--write", "--check"], 1),  # a file that is not there is a problem in the list of files
    "demo": (["--attn", "fa2"], 1),
}


def test_errors_under_json_are_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    have = {c.name for c in app.registered_commands if "as_json" in inspect.signature(c.callback).parameters}  # type: ignore[arg-type]  # never None
    assert have == VERBS.keys()
    for verb, (arguments, code) in VERBS.items():
        for typed, expected in ((arguments, code), ([*arguments, "--no-such-option"], 2)):
            done = runner.invoke(app, [verb, *typed, "--json"])
            assert done.exit_code == expected, (verb, done.output)
            error = json.loads(done.stdout)["error"]
            assert error["type"], verb
            assert error["message"], verb
            assert "Traceback" not in done.output


def test_doctor_says_in_one_json_what_is_required_and_missing() -> None:
    done = runner.invoke(app, ["doctor", "--require", "fp8", "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert found["error"]["type"] == "BackendUnavailableError"
    assert found["kernels"]


def test_a_benchmark_of_names_that_all_fail_fails(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    common = ["bench", str(tmp_path), "--model-step", "--seq-len", "32", "--packed", "2", "--rounds", "1", "--json"]
    done = runner.invoke(app, [*common, "--attn", "nope"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["type"] == "UnknownAttentionError"
    done = runner.invoke(app, [*common, "--attn", "fp8"])
    assert done.exit_code == 1
    assert "can't run on this machine" in json.loads(done.stdout)["steps"][1]["failed"]
    assert runner.invoke(app, [*common, "--attn", "varlen", "--attn", "fp8"]).exit_code == 0


def test_an_error_from_outside_axattn_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("axattn.planning.diagnosis.diagnose", broken)
    done = runner.invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    assert done.stderr == "axattn: RuntimeError: out of memory (set AXATTN_TRACEBACK=1 for the traceback)\n"
    assert json.loads(done.stdout)["error"]["message"] == "out of memory"
    monkeypatch.setenv("AXATTN_TRACEBACK", "1")
    assert isinstance(runner.invoke(app, ["doctor"]).exception, RuntimeError)
