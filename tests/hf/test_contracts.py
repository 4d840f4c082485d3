"""What axattn takes for granted about other packages: a version that changes it is named, and refused, at first."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from typer.testing import CliRunner

import axattn
from axattn.errors import UnsupportedAttentionError
from axattn.hf import canary, contracts, integrations, transformers_contracts
from axattn.hf.contracts import Contract, every_contract
from axattn.hf.torch_internals import calls_around
from tests.models import build, positions, tokens

NAMES = [contract.name for contract in every_contract()]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing checked, nothing seen wrong, nothing kept."""
    monkeypatch.setattr(canary, "_checked", False)
    monkeypatch.setattr(contracts, "_found_wrong", [])
    monkeypatch.setattr(canary, "_file", lambda: tmp_path / "axattn" / "canary.json")
    contracts._broken.cache_clear()
    yield
    contracts._broken.cache_clear()


@pytest.mark.parametrize("contract", every_contract(), ids=NAMES)
def test_other_packages_are_as_axattn_takes_them_to_be(contract: Contract) -> None:
    pytest.importorskip(contract.package, reason=f"{contract.package} is not installed")
    assert contract.difference() == ""
    with torch.inference_mode(), torch.device("meta"):  # wherever a model is first loaded
        assert contract.difference() == ""


def test_the_installed_versions_are_tested_ones() -> None:
    for package, version in (("transformers", transformers.__version__), ("torch", torch.__version__)):
        low, high = contracts.OLDEST_TESTED[package], contracts.NEWEST_TESTED[package]
        assert Version(low) <= Version(Version(version).base_version) <= Version(high)


def test_every_user_of_a_contract_is_a_module() -> None:
    package = Path(axattn.__file__).parent
    for contract in every_contract():
        for user in contract.users:
            assert (package / f"{user.replace('.', '/')}.py").is_file(), (contract.name, user)


def other_mask_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils as mu

    monkeypatch.setattr(mu, "sliding_window_overlay", lambda size: lambda b, h, q, k: q - k < size)


def more_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    known = transformers_contracts.MASK_KEYWORDS - {"mask_function"}
    monkeypatch.setattr(transformers_contracts, "MASK_KEYWORDS", known)


def another_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda **_: torch.ones(1, 1, 3, 3).bool())


def another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.PreTrainedModel.set_attn_implementation")


def another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(self: Any, q: Any, k: Any, v: Any, mask: Any) -> None: ...

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", function)


def another_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Any = None, veil: Any = None) -> None: ...

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel.forward", forward)


def another_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.DynamicCache.get_seq_length", lambda self, *_: 0)


def another_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "axattn.hf.torch_internals.cpu_flash_forward", lambda q, k, v, *_: (v.clone(), q.new_zeros(1, 1, 4))
    )


def another_call_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axattn.hf.torch_internals._CALL", None)


def another_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "adapter_keywords", lambda model: {})


BREAKS = {
    "calls of mask functions": [other_mask_functions, more_keywords],
    "dense masks": [another_dense_mask],
    "names in configs": [another_name],
    "calls of attention functions": [another_call],
    "keywords of forwards": [another_word],
    "caches": [another_cache],
    "flash attention on a CPU": [another_flash],
    "calls of modules": [another_call_of_modules],
    "hooks of adapters": [another_adapter],
}


@pytest.mark.parametrize(("name", "change"), [(name, one) for name, some in BREAKS.items() for one in some])
def test_a_contract_that_does_not_hold_is_reported(name: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    contract = next(one for one in every_contract() if one.name == name)
    assert contract.difference()


def broken(monkeypatch: pytest.MonkeyPatch, refused: contracts.Refused) -> None:
    contract = Contract("shape of things", "torch", ("documents.input_hook",), lambda: "they are round", refused)
    monkeypatch.setattr(contracts, "every_contract", lambda: (contract,))


def test_models_are_refused_by_name_where_a_contract_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "models")
    model = build("llama")
    with pytest.raises(UnsupportedAttentionError, match=r"shape of things of torch .*: they are round\. Use .*sdpa"):
        axattn.apply(model, "auto")
    assert axattn.status(axattn.apply(model, "sdpa")).running == {"": "sdpa"}


@torch.no_grad()
def test_packed_rows_are_refused_and_others_run_where_their_contract_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken(monkeypatch, "packed rows")
    with caplog.at_level(logging.WARNING, "axattn"):
        model = axattn.apply(build("llama"), "auto")
    assert "0 of 1 contracts hold; shape of things of torch" in caplog.text
    assert "(packed rows refused)" in caplog.text
    with pytest.raises(UnsupportedAttentionError, match="they are round"):
        model(tokens(1, 10), position_ids=positions((4, 6)))
    assert torch.allclose(model(tokens(1, 10)).logits, build("llama")(tokens(1, 10)).logits, atol=1e-5)
    with pytest.raises(UnsupportedAttentionError, match="they are round"):
        axattn.apply(build("llama"), "auto", unpad=True)


def test_compiled_packed_rows_are_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    broken(monkeypatch, "compiled packed rows")
    model = axattn.apply(build("llama", num_hidden_layers=1), "auto")
    given = {"input_ids": tokens(1, 10), "position_ids": positions((4, 6)), "use_cache": False}
    with torch.no_grad():
        model(**given)
        with pytest.raises(RuntimeError, match="packed rows would leak here"):
            torch.compile(model, backend="eager")(**given)


def test_a_model_under_peft_is_refused_without_positions_where_wrappers_can_not_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft.peft_model", reason="peft is not installed")
    model = axattn.apply(build("llama"), "auto")
    with torch.no_grad():
        model(tokens(1, 10))
        monkeypatch.setattr("axattn.hf.torch_internals._CALL", None)
        with pytest.raises(UnsupportedAttentionError, match="can't be seen"):
            model(tokens(1, 10))


def test_the_call_of_a_module_and_those_around_it_are_found() -> None:
    seen: list[Any] = []
    outer = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Identity()))
    outer[0][0].register_forward_pre_hook(lambda module, args: seen.extend(calls_around(module)))
    outer(torch.zeros(3))
    own, around = seen
    assert own
    assert [module for module, *_ in around] == [outer[0], outer]


def test_doctor_lists_contracts_and_what_a_broken_one_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    from axattn.cli import app

    found = CliRunner().invoke(app, ["doctor", "--json"])
    every = json.loads(found.stdout)["contracts"]
    assert {one["name"] for one in every} <= set(NAMES)
    assert len(every) >= 20
    assert not any(one["different"] for one in every)
    broken(monkeypatch, "packed rows")
    shown = " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
    assert "0 of 1 contracts with other packages hold" in shown
    assert "they are round (packed rows are refused; used by documents.input_hook)" in shown


# ---- newer versions --------------------------------------------------------------------------------------------------


def newer(monkeypatch: pytest.MonkeyPatch, version: str = "5.16.0") -> None:
    monkeypatch.setitem(contracts.NEWEST_TESTED, "transformers", version)


def said(caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.DEBUG, "axattn"):
        axattn.apply(build("llama"), "auto")
    return caplog.text


def test_a_tested_version_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert "newer" not in said(caplog)


def test_a_patch_release_is_not_newer() -> None:
    assert not contracts.untested([("transformers", "5.24.9")])
    assert contracts.untested([("transformers", "5.25.0.dev0"), ("torch", "2.13.0+cpu")]).keys() == {
        ("transformers", "5.25.0.dev0")
    }


def test_a_newer_version_is_tried_once_and_the_result_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newer(monkeypatch)
    text = said(caplog)
    assert f"transformers {transformers.__version__} is newer than the newest tested (5.16.0)" in text
    assert "contracts hold; the canary, a two-layer Qwen 2 against eager: right: packed, padded, cached" in text
    assert "wrong" not in text
    caplog.clear()
    assert "newer" not in said(caplog)  # once a process
    monkeypatch.setattr(canary, "_checked", False)
    monkeypatch.setattr(canary, "run", None)  # kept on disk
    assert "(from an earlier run): right: packed" in said(caplog)


def test_an_older_version_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(contracts.OLDEST_TESTED, "transformers", "5.30.0")
    monkeypatch.setattr(canary, "run", lambda apply: dict.fromkeys(canary.SCENARIOS, ""))
    assert f"transformers {transformers.__version__} is older than the oldest tested (5.30.0)" in said(caplog)


def test_the_canary_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    newer(monkeypatch)
    monkeypatch.setenv(canary.SWITCH, "off")
    monkeypatch.setattr(canary, "run", None)
    assert "the canary is off (AXATTN_CANARY)" in said(caplog)


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"x": 3}'])
def test_a_file_that_was_not_written_by_the_canary_is_left_out(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "run", lambda apply: dict.fromkeys(canary.SCENARIOS, ""))
    path = canary._file()
    path.parent.mkdir()
    path.write_text(text)
    assert canary.results(axattn.apply) == (dict.fromkeys(canary.SCENARIOS, ""), False)
    assert canary.results(axattn.apply)[1]


def test_a_folder_that_can_not_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(canary, "_file", lambda: tmp_path / "file" / "canary.json")
    monkeypatch.setattr(canary, "run", lambda apply: dict.fromkeys(canary.SCENARIOS, ""))
    assert not canary.results(axattn.apply)[1]


@torch.no_grad()
def test_what_the_canary_finds_wrong_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newer(monkeypatch)
    monkeypatch.setitem(canary.SCENARIOS, "packed", lambda *_: 0.7)
    assert "wrong, and refused: packed: error 0.7" in said(caplog)
    model = axattn.apply(build("llama"), "auto")
    with pytest.raises(UnsupportedAttentionError, match=rf"on transformers {transformers.__version__} packed rows"):
        model(tokens(1, 10), position_ids=positions((4, 6)))
    model(tokens(1, 10))


def test_a_scenario_that_raises_is_wrong_and_models_are_refused_where_rows_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newer(monkeypatch)
    monkeypatch.setitem(canary.SCENARIOS, "padded", lambda *_: {}["x"])
    with pytest.raises(UnsupportedAttentionError, match=r"padded rows are wrong \(KeyError: 'x'\)\. Use .*sdpa"):
        axattn.apply(build("llama"), "auto")


def test_a_canary_that_can_not_be_built_does_not_end_the_load_of_another_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newer(monkeypatch)
    monkeypatch.setattr(canary, "_models", lambda: {}["qwen2"])
    with pytest.raises(UnsupportedAttentionError, match=r"padded rows are wrong \(KeyError"):
        axattn.apply(build("llama"), "auto")
    axattn.apply(build("llama"), "sdpa")


def leak_through_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axattn.documents.input_hook.mark_packed", lambda *_: None)


def leak_in_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axattn.documents.read_inputs.from_positions", lambda *_: None)


def wrong_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    from axattn.hf import mask_functions

    recognise = mask_functions.recognise

    def wider(function: Any) -> Any:
        pattern = recognise(function)
        return pattern and mask_functions.Pattern(causal=pattern.causal, base=pattern.base)

    monkeypatch.setattr("axattn.masks.mask_interface.recognise", wider)


@pytest.mark.parametrize(
    ("change", "scenario"),
    [(leak_through_caches, "packed and cached"), (leak_in_packed_rows, "packed"), (wrong_windows, "padded")],
)
def test_the_canary_sees(change: Any, scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    assert canary.run(axattn.apply)[scenario]


def test_the_canary_leaves_the_process_as_it_was() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert not any(canary.run(axattn.apply).values())
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(2), wanted)
    assert torch.get_num_threads() == threads


@pytest.mark.nightly
def test_nothing_is_checked_while_transformers_is_being_imported() -> None:
    """`make test` looks at it in ``tests/test_robustness.py``, where orders of imports are tried."""
    code = "import axattn, transformers; from transformers import LlamaModel; from axattn.hf import contracts as c"
    code += "; print(axattn.registered(), c._broken.cache_info().misses)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True 0", done.stderr


def test_a_package_that_is_only_on_the_path_has_a_version_all_the_same() -> None:
    assert contracts.version_of("transformers") == transformers.__version__
    assert contracts.version_of("axattn_on_the_path") == "unknown"
