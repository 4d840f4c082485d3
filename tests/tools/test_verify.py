"""verify: right kernels pass, each fault put in on purpose is found, what can't be verified is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import axattn
from axattn.backends import sdpa, varlen
from axattn.backends.varlen_engine import packed
from axattn.cli import app
from axattn.documents import read_inputs
from axattn.errors import InvalidInputError, UnsupportedAttentionError
from axattn.masks import lazy_mask, mask_interface
from axattn.tools.verify import modules, whole
from tests.census.examine import build as census
from tests.conformance.families import FAMILIES
from tests.faults import Inject, Patch, fault
from tests.interpreter import INTERPRETED, interpreting
from tests.models import build

runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def folder(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"verify-{family}"
        if not path.exists():
            (build(family) if family != "bert" else FAMILIES["bert"].make()).save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss", "mixtral", "bert"])
def test_auto_is_right_on_a_model(folders: Any, family: str) -> None:
    found = axattn.verify(folders(family), "auto")
    assert found.right, found
    assert found.weights == "loaded"
    decoders = {"left padding", "decoding", "packed, all-ones mask"}
    assert (decoders <= {c.scenario for c in found.checks}) is (family != "bert")
    assert {c.outcome for c in found.checks} == {"ok"}


@pytest.mark.parametrize(
    ("model_type", "head", "refused"),
    [("roberta", "masked", False), ("bart", "causal", True), ("mobilebert", "masked", True)],
)
def test_what_a_model_does_to_padded_or_packed_rows_by_itself_is_not_the_kernel_s_fault(
    model_type: str, head: str, refused: bool, tmp_path: Path
) -> None:
    """RoBERTa counts from one past its padding id, BART along the row, MobileBERT's embeddings look at neighbours."""
    census(model_type, head).save_pretrained(tmp_path)
    found = axattn.verify(tmp_path, "auto")
    assert found.right, found
    outcomes = {check.scenario: check.outcome for check in found.checks}
    assert outcomes["right padding"] == "ok"
    assert outcomes["packed, one row"] == ("refused" if refused else "ok")


def test_the_calls_of_all_layers_are_counted(folders: Any) -> None:
    one, two = (axattn.verify(folders("llama"), "varlen", layers=layers).kernels for layers in (1, 2))
    assert two == {kernel: 2 * calls for kernel, calls in one.items()}


def test_a_lossy_kernel_has_a_budget(folders: Any) -> None:
    if not INTERPRETED:
        pytest.skip("Triton's interpreter is off")
    with interpreting():
        found = axattn.verify(folders("mistral"), "sage", layers=1)
    assert found.right, found
    assert found.kernels.keys() >= {"sage"}
    assert max(check.error or 0 for check in found.checks) > 1e-4


def test_what_transformers_leaks_is_refused_not_wrong(folders: Any) -> None:
    found = axattn.verify(folders("llama"), "sdpa")
    outcomes = {check.scenario: check.outcome for check in found.checks}
    assert outcomes["dense"] == "ok"
    assert outcomes["packed, one row"] == "refused"
    assert found.right


@fault("`axattn.verify`: packed, one row; no leak; gradients, packed")
def the_documents_of_rows_are_not_read(patch: Patch) -> None:
    patch.setattr(read_inputs, "from_positions", lambda *_: None)


@fault("`axattn.verify`: left padding")
def padding_is_not_masked(patch: Patch) -> None:
    patch.setattr(lazy_mask.LazyMask, "padding", property(lambda self: None))


@fault("`axattn.verify`: dense; longer than the window; a module alone")
def the_window_is_forgotten(patch: Patch) -> None:
    real = mask_interface.recognise

    def changed(function: Any) -> Any:
        found = real(function)
        return None if found is None else type(found)(causal=found.causal, chunk=found.chunk)

    patch.setattr(mask_interface, "recognise", changed)


@fault("`axattn.verify`: gradients, packed; a module alone; `VerifyCallback` stops the run")
def keys_get_no_gradient(patch: Patch) -> None:
    real = packed.over_layout

    def dropped(call: Any, layout: Any) -> torch.Tensor:
        call.key = call.key.detach()
        return real(call, layout)

    patch.setattr(varlen, "over_layout", dropped)


@fault("`axattn.verify`: packed, many rows; a module alone")
def logits_are_scaled_twice(patch: Patch) -> None:
    real = sdpa.sdpa

    def scaled(call: Any) -> torch.Tensor:
        call.scale = 2 * call.scale
        return real(call)

    patch.setattr(sdpa, "sdpa", scaled)
    patch.setattr(varlen, "over_layout", lambda call, layout: scaled(call))


@pytest.mark.parametrize(
    ("inject", "family", "scenario"),
    [
        (the_documents_of_rows_are_not_read, "llama", "packed, one row"),
        (the_documents_of_rows_are_not_read, "llama", "no leak"),
        (the_documents_of_rows_are_not_read, "llama", "gradients, packed"),
        (padding_is_not_masked, "llama", "left padding"),
        (the_window_is_forgotten, "mistral", "dense"),
        (the_window_is_forgotten, "mistral", "longer than the window"),
        (keys_get_no_gradient, "llama", "gradients, packed"),
        (logits_are_scaled_twice, "llama", "packed, many rows"),
    ],
)
def test_a_fault_is_found(folders: Any, inject: Inject, family: str, scenario: str, monkeypatch: Patch) -> None:
    folder = folders(family)
    inject(monkeypatch)
    found = axattn.verify(folder, "varlen")
    check = next(check for check in found.checks if check.scenario == scenario)
    assert check.outcome == "wrong", check
    assert not found.right
    assert check.detail


@pytest.mark.parametrize("inject", [the_documents_of_rows_are_not_read, keys_get_no_gradient, logits_are_scaled_twice])
def test_a_fault_is_found_with_random_weights_too(
    folders: Any, inject: Inject, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "config.json").write_text((folders("llama") / "config.json").read_text())
    inject(monkeypatch)
    found = axattn.verify(tmp_path / "config.json", "varlen")
    assert found.weights == "random"
    assert not found.right


def test_rows_longer_than_a_window_are_run_or_it_is_reported(tmp_path: Path) -> None:
    build("mistral", sliding_window=200).save_pretrained(tmp_path / "a")
    assert "longer than the window" in {c.scenario for c in axattn.verify(tmp_path / "a", "varlen", layers=1).checks}
    build("mistral", sliding_window=9000, max_position_embeddings=16384).save_pretrained(tmp_path / "b")
    long = next(c for c in axattn.verify(tmp_path / "b", "varlen", layers=1).checks if "longer" in c.scenario)
    assert (long.outcome, "9,032 tokens" in long.detail) == ("refused", True)


def test_an_overflow_of_eager_excuses_no_wrong_output() -> None:
    exact = {"output": torch.ones(3)}
    wrong, nan = {"output": torch.full((3,), 5.0)}, {"output": torch.full((3,), float("nan"))}
    for found in (wrong, nan):
        assert whole._judge("dense", found, exact, nan, torch.float16, False).outcome == "wrong"


def test_layers_data_and_dtype(folders: Any, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("attention is what you verify " * 20)
    found = axattn.verify(folders("llama"), "varlen", layers=1, data=text, dtype=torch.bfloat16)
    assert (found.layers, found.dtype) == (1, "bfloat16")
    assert found.right, found
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InvalidInputError, match=r"empty\.txt is empty"):
        axattn.verify(folders("llama"), data=tmp_path / "empty.txt")
    with pytest.raises(InvalidInputError, match="layers=-1"):
        axattn.verify(folders("llama"), layers=-1)


def test_weights_that_can_not_be_read(folders: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders("llama") / "config.json").read_text())
    (tmp_path / "model.safetensors").write_text("garbage")
    with pytest.raises(InvalidInputError, match="can't be loaded: SafetensorError"):
        axattn.verify(tmp_path)
    assert axattn.verify(tmp_path / "config.json", layers=1).weights == "random"


@pytest.mark.parametrize("family", ["t5", "gemma3_vl"])
def test_models_with_other_inputs_are_refused(family: str, tmp_path: Path) -> None:
    FAMILIES[family].make().save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="VerifyCallback"):
        axattn.verify(tmp_path)


# ---- modules alone, and the Trainer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss", "mistral", "granite", "bert", "gemma3_vl"])
def test_each_kind_of_module_is_right(family: str) -> None:
    model = axattn.apply(FAMILIES[family].make(), "auto")
    checks = modules.verify_modules(model)
    assert checks
    assert {check.outcome for check in checks} == {"ok"}, checks
    assert all(not layer.served for layer in axattn.status(model).layers)


@pytest.mark.parametrize("inject", [keys_get_no_gradient, logits_are_scaled_twice, the_window_is_forgotten])
def test_a_fault_of_a_module_is_found(inject: Inject, monkeypatch: Patch) -> None:
    model = axattn.apply(build("mistral"), "varlen")
    inject(monkeypatch)
    assert {check.outcome for check in modules.verify_modules(model)} == {"wrong"}


def trained(tmp_path: Path, model: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}] * 4
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[axattn.VerifyCallback()])
    trainer.train()
    return trainer


def test_the_callback_lets_a_right_run_pass(tmp_path: Path) -> None:
    assert trained(tmp_path, axattn.apply(build("llama"), "auto")).state.global_step == 2


def test_the_callback_stops_a_run_whose_kernel_is_wrong(tmp_path: Path, monkeypatch: Patch) -> None:
    model = axattn.apply(build("llama"), "varlen")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    keys_get_no_gradient(monkeypatch)
    with pytest.raises(UnsupportedAttentionError, match=r"training was not started.*dk is missing"):
        trained(tmp_path, model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "reason"), [(None, "no attention module"), ("sdpa", "no attention"), ("s2", "s2 has")]
)
def test_the_callback_stops_a_run_on_which_it_can_verify_nothing(name: str | None, reason: str, tmp_path: Path) -> None:
    model = build("llama") if name is None else axattn.apply(build("llama"), name)
    with pytest.raises(UnsupportedAttentionError, match=rf"training was not started.*{reason}.*remove VerifyCallback"):
        trained(tmp_path, model)


@pytest.mark.parametrize("length", [1, 11, 0, -3, 12.5, True, "96"])
def test_rows_too_short_to_verify_are_refused_at_once(length: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"length={length!r}.*Give 12 or more"):
        axattn.verify("no such folder", length=length)


def test_where_every_scenario_is_refused_nothing_is_right(folders: Any) -> None:
    found = axattn.verify(folders("llama"), "varlen", length=100_000)
    assert {check.outcome for check in found.checks} == {"refused"}
    assert (found.verified, found.right) == (False, False)
    arguments = ["verify", str(folders("llama")), "--length", "100000"]
    done = runner.invoke(app, arguments)
    assert (done.exit_code, "Nothing was verified" in done.output, "Nothing is wrong" in done.output) == (
        1,
        True,
        False,
    )
    done = runner.invoke(app, [*arguments, "--json"])
    assert (done.exit_code, json.loads(done.stdout)["right"]) == (1, False)
    assert "Nothing was verified" in json.loads(done.stdout)["verdict"]


# ---- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb(folders: Any, monkeypatch: Patch) -> None:
    folder = str(folders("llama"))
    done = runner.invoke(app, ["verify", folder])
    assert done.exit_code == 0, done.output
    assert "Nothing is wrong" in done.output
    found = json.loads(runner.invoke(app, ["verify", folder, "--attn", "varlen", "--json"]).output)
    assert found["right"]
    assert len(found["checks"]) == 9
    the_documents_of_rows_are_not_read(monkeypatch)
    done = runner.invoke(app, ["verify", folder, "--attn", "varlen"])
    assert done.exit_code == 1
    assert "Something is wrong" in done.output
    refused = runner.invoke(app, ["verify", folder, "--attn", "fa2"])
    assert refused.exit_code == 1
    assert "flash_attention_2" in refused.stderr


def test_a_loaded_model_is_verified_on_a_copy_and_left_as_it_is() -> None:
    model = axattn.apply(build("llama", attention_dropout=0.1), "auto").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = axattn.verify(model, "varlen")
    assert found.right
    assert found.weights == "yours"
    assert found.kernels["varlen"] > 10
    assert model.training
    assert model.model.layers[0].self_attn.attention_dropout == 0.1
    assert axattn.status(model).layers[0].asked == "auto"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
