"""Hub kernels without a hub: which stand in for libraries, what runs and is said, what is refused and when.

The hub is faked where Transformers asks it (``get_kernel``): a strict fake of FlashAttention 2 is what it gives.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.hub_kernels as transformers_hub
import transformers.modeling_flash_attention_utils as fa
import transformers.modeling_utils

import axattn
from axattn import backends
from axattn.backends import hub, hub_records
from axattn.errors import BackendUnavailableError, UnsupportedAttentionError
from axattn.hf import flash_stand_ins, hub_kernels
from axattn.machine import hub_cache
from axattn.machine.environment import Environment
from axattn.planning import capability_docs, planner
from axattn.planning.plan import Policy
from axattn.spec import names
from axattn.spec.capability import Need
from axattn.traits.layer_needs import LayerNeed, ModelNeeds
from tests.environments import machine
from tests.fakes import flash
from tests.models import alone, build, positions, tokens

FLASH = "kernels-community/flash-attn2"
NO_FLASH: dict[str, Any] = {"flash_attn": None, "flash_attn_3": None, "flash_attn_4": None}


def without(device: str = "cuda", sm: int | None = 90, **libraries: Any) -> Environment:
    """A machine without flash libraries, on Transformers 5.24 unless another is given."""
    rocm = "6.2" if device == "rocm" else None
    return machine(
        device, sm if device == "cuda" else None, rocm, **{**NO_FLASH, "transformers": "5.24.0", **libraries}
    )


# ---- which, and what is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "environment", "kernel"),
    [
        ("flash_attention_2", without(), f"{FLASH}@v4"),
        ("flash_attention_2", without(torch="2.9.1"), f"{FLASH}@v3"),
        ("flash_attention_2", without(transformers="5.21.0", kernels="0.17.2"), f"{FLASH}@v3"),
        ("flash_attention_2", without("xpu"), f"{FLASH}@v4"),
        ("flash_attention_2", without("rocm"), "kernels-community/aiter-flash-attn@v2"),
        ("flash_attention_2", without(flash_attn="2.1"), f"{FLASH}@v4"),
        ("flash_attention_3", without(), "kernels-community/vllm-flash-attn3@v1"),
        ("flash_attention_3", without(sm=80), "kernels-community/vllm-flash-attn3@v1"),
        ("flash_attention_4", without(sm=100), "kernels-community/flash-attn4@v0"),
    ],
)
def test_what_runs_where_the_library_is_absent_is_named_with_its_version(
    name: str, environment: Environment, kernel: str
) -> None:
    plan = axattn.plan(build("llama", head_dim=16), name, environment=environment)
    assert plan.running == {"": name}
    assert plan.loads == {"": kernel}
    assert {entry.chosen for entry in plan.layers} == {kernel}
    assert any(note.startswith(f"{name} → {kernel} for the model: its library is not installed") for note in plan.notes)
    (found,) = [one for one in axattn.diagnose(environment).kernels if one.name == name]
    assert found.usable
    assert found.hub == kernel


@pytest.mark.parametrize("name", names.FLASH)
def test_a_library_that_is_there_runs_itself(name: str) -> None:
    assert flash_stand_ins.stand_in(name, machine("cuda", 90, transformers="5.24.0")) is None


@pytest.mark.parametrize("device", ["cpu", "mps", "npu"])
def test_nothing_stands_in_where_no_kernel_has_a_build(device: str) -> None:
    with pytest.raises(BackendUnavailableError, match="needs an NVIDIA GPU"):
        planner.require_available("flash_attention_2", without(device))


def test_auto_and_upgrades_load_nothing_from_the_hub() -> None:
    assert not set(planner.usable_exact(without())) & set(names.FLASH)
    here = machine("cuda", 90, flash_attn_4=None, transformers="5.24.0")
    assert axattn.plan(build("llama"), "flash_attention_2", environment=here).running == {"": "flash_attention_2"}


OFFLINE = dataclasses.replace(without(), hub_offline=True)


@pytest.mark.parametrize(
    ("environment", "reason", "fix"),
    [
        (
            without(kernels=None),
            "kernels is not installed",
            'pip install "kernels>=0.18.2,<0.19" (downloads for some minutes',
        ),
        (without(kernels="0.17.2"), "needs kernels >=0.18.2,<0.19", 'pip install "kernels>=0.18.2,<0.19" (downloads'),
        (OFFLINE, f"its cache has no {FLASH}@v4", f"get_kernel('{FLASH}', revision='v4')"),
    ],
)
def test_what_keeps_a_kernel_from_running_is_reported_with_both_ways_out(
    environment: Environment, reason: str, fix: str
) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        planner.require_available("flash_attention_2", environment)
    text = str(caught.value)
    assert "flash-attn is not installed; Transformers would run the hub kernel" in text
    assert reason in text
    assert fix in text
    assert "pip install flash-attn --no-build-isolation (compiled from source, which can take an hour" in text


@pytest.mark.parametrize("have", [f"{FLASH}@v4", f"{FLASH}@*"])
def test_offline_a_cached_kernel_runs(have: str) -> None:
    planner.require_available("flash_attention_2", dataclasses.replace(OFFLINE, hub_cached=frozenset({have})))


def test_the_cache_is_read_as_kernels_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("LOCAL_KERNELS", "someone/flash=/there:kernels-community/flash-attn3=/here")
    for inside in ("refs/v4", "snapshots/0510be1e"):
        (tmp_path / "kernels--kernels-community--flash-attn2" / inside).mkdir(parents=True)
    known = {FLASH, "kernels-community/flash-attn3", "kernels-community/flash-attn4"}
    assert hub_cache.cached(known) == {f"{FLASH}@v4", f"{FLASH}@0510be1e", "kernels-community/flash-attn3@*"}


def test_layer_by_layer_the_library_is_needed_and_the_plan_says_so() -> None:
    layers = tuple(
        LayerNeed("", index, "full_attention", Need(head_dim=size, heads=4, kv_heads=2))
        for index, size in ((0, 64), (1, 512))
    )
    needs = ModelNeeds("Model", layers, ("",), ())
    plan = planner.plan(needs, "flash_attention_2", without(), Policy(on_unsupported="route"))
    assert plan.running == {"": "auto"}
    assert not set(names.FLASH) & set(plan.orders[""])  # a call of one would be an ImportError
    assert not any(names.is_flash(entry.chosen) for entry in plan.layers)
    assert any("can't serve single layers here without its library" in note for note in plan.notes)


def test_every_known_kernel_has_a_record_and_a_row() -> None:
    assert set(hub_records.FLASH) == names.HUB_FLASH_REPOSITORIES
    page = capability_docs.page()
    for repository in names.HUB_FLASH_REPOSITORIES | names.HUB_SAGE_REPOSITORIES:
        assert f"| `{repository}`: " in page


@pytest.mark.parametrize(
    ("path", "environment", "need", "reason"),
    [
        (f"{FLASH}@v4", without("cpu"), Need(window=8), "no sliding window"),
        (f"{FLASH}@v4", without("cpu"), Need(softcap=30.0), "no softcap"),
        (f"{FLASH}@v4", without("cpu"), Need(gradient=True), "no gradient"),
        (f"{FLASH}@v4", without("xpu"), Need(softcap=30.0), "no softcap"),
        ("kernels-community/vllm-flash-attn3@v1", without(sm=80), Need(sinks=True), "no attention sinks"),
        ("kernels-community/vllm-flash-attn3@v1", without(), Need(sinks=True, gradient=True), "no gradient"),
        ("kernels-community/flash-attn4@v0", without(sm=100), Need(head_dim=256), "up to 128"),
        ("kernels-community/flash-attn4@v0", without(), Need(softcap=30.0, gradient=True), "no softcap in backward"),
        ("kernels-community/aiter-flash-attn@v1", without("rocm"), Need(sinks=True), "no attention sinks"),
        ("kernels-community/metal-flash-sdpa@v2", without("mps"), Need(gradient=True), "no gradient"),
        ("kernels-community/metal-flash-sdpa@v1", without("mps"), Need(window=8), "no sliding window"),
        ("kernels-community/metal-flash-sdpa@v2", without("mps"), Need(sinks=True, window=8), ""),
        ("kernels-community/aiter-flash-attn@v2", without("rocm"), Need(sinks=True, window=8, gradient=True), ""),
        ("kernels-community/vllm-flash-attn3@v1", without(), Need(sinks=True, window=8), ""),
    ],
)
def test_the_records_are_those_of_each_kernel(path: str, environment: Environment, need: Need, reason: str) -> None:
    planner.require_available(path, environment)
    record = backends.get(path).capability_on(environment)
    texts = [one.text for one in planner.missing(need, record, path)]
    assert [reason] == [reason for text in texts if reason in text] if reason else not texts, texts


@pytest.mark.parametrize(
    ("path", "environment", "reason"),
    [
        ("kernels-community/aiter-flash-attn@v2", without(), "has builds for rocm"),
        ("kernels-community/metal-flash-sdpa@v2", without(), "has builds for mps"),
        ("kernels-community/flash-attn3@v1", without(sm=100), "runs on sm80 to sm90"),
        ("kernels-community/flash-attn4@v0", without(nvidia_cutlass_dsl=None), "nvidia-cutlass-dsl is not installed"),
    ],
)
def test_what_a_kernel_has_no_build_for(path: str, environment: Environment, reason: str) -> None:
    with pytest.raises(BackendUnavailableError, match=reason):
        planner.require_available(path, environment)


# ---- loaded and run --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Hub:
    """What the fake of the hub gives, and what it was asked for."""

    module: Any
    asked: list[Any] = dataclasses.field(default_factory=list)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hub]]:
    """A machine without flash libraries whose hub has one kernel, on which float32 and a CPU are served."""

    def make(build: str = "_flash_attn2_cuda_48628c8", **record: Any) -> Hub:
        found = Hub(kernel_module(build))

        def get_kernel(name: str, revision: Any = None, version: Any = None, allow_all_kernels: bool = False) -> Any:
            found.asked.append((name, revision, version))
            return found.module

        environment = without()
        known = hub_records.FLASH[FLASH]
        wide = {"devices": frozenset({"cuda", "cpu"}), "dtypes": frozenset({"float32"})}
        served = dataclasses.replace(known.serves["cuda"], **wide, **record)
        here = {**hub_records.FLASH, FLASH: dataclasses.replace(known, serves={"cuda": served})}
        monkeypatch.setattr(hub, "FLASH", here)
        monkeypatch.setattr(Environment, "current", classmethod(lambda cls: environment))
        monkeypatch.setattr(transformers_hub, "get_kernel", get_kernel)
        for place in (transformers_hub, transformers.modeling_utils):
            monkeypatch.setattr(place, "is_kernels_available", lambda *_, **__: True)
        monkeypatch.setattr(fa, "_loaded_implementation", None)
        backends.get.cache_clear()
        return found

    with flash.sharp():
        flash.calls.clear()
        yield make
    fa._loaded_implementation = None  # its functions are the fake's
    backends.get.cache_clear()


def kernel_module(build: str) -> Any:
    """The fake of FlashAttention 2 as ``kernels`` imports it: its modules are named after the build."""

    def copied(function: Any) -> Any:
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
        made.__module__ = f"{build}.flash_attn_interface"
        return made

    source = flash.FlashAttention2
    names_ = ("flash_attn_func", "flash_attn_varlen_func")
    return types.SimpleNamespace(**{name: copied(getattr(source, name)) for name in names_})


def test_a_stand_in_runs_packed_rows_right_and_status_says_what_runs(fake: Callable[..., Hub]) -> None:
    asked = fake()
    model, ids, lengths = build("llama"), tokens(1, 12), (5, 7)
    expected = alone(build("llama"), ids, lengths)
    axattn.apply(model, "flash_attention_2")
    assert [(name, revision) for name, revision, _ in asked.asked] == [(FLASH, None)]
    assert model.config._attn_implementation == FLASH
    status = axattn.status(model)
    assert status.hub == {"": f"{FLASH}@v4"}
    assert f"flash_attention_2 → {FLASH}, the hub kernel {FLASH}@v4" in str(status)
    found = model(ids, position_ids=positions(lengths), use_cache=False).logits
    assert flash.calls
    assert torch.allclose(found, expected, atol=1e-4)
    found.sum().backward()  # v4 has the gradient of grouped heads
    axattn.restore(model)
    assert axattn.status(model).hub == {}


@pytest.mark.parametrize(
    ("revision", "build_", "kv_heads", "served"),
    [
        ("v3", "_flash_attn2_cuda_48628c8", 2, False),
        ("a394b68dfeedfeedfeedfeedfeedfeedfeedfeed", "_flash_attn2_cuda_48628c8", 2, False),
        ("v3", "_flash_attn2_cuda_48628c8", 4, True),  # heads that are not grouped
        ("v3", "_flash_attn2_cuda_4eec01c", 2, True),  # a build that is known to be fixed
        ("0510be1e482269a46fadf30069aca3ede496ff9b", "_flash_attn2_cuda_4eec01c", 2, True),
        ("v2", "_flash_attn2_cuda_1234567", 2, True),
    ],
)
def test_a_bad_revision_is_refused_in_training_and_serves_inference(
    fake: Callable[..., Hub], revision: str, build_: str, kv_heads: int, served: bool
) -> None:
    fake(build_)
    reference = build("llama", num_key_value_heads=kv_heads)
    model = axattn.apply(build("llama", num_key_value_heads=kv_heads), f"{FLASH}@{revision}")
    ids = tokens(2, 8)
    expected = reference(ids).logits
    assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    if served:
        model.train()(ids, labels=ids).loss.backward()
        return
    for mode in (True, False):
        with pytest.raises(UnsupportedAttentionError, match="grouped heads in training") as caught:
            model.train(mode)(ids, labels=ids).loss.backward()
        assert f"{FLASH}@v4" in str(caught.value)


@pytest.mark.parametrize("trained", ["", "q_proj"])  # all, or what only the kernel's output depends on
def test_a_kernel_without_a_gradient_loses_none_in_silence(fake: Callable[..., Hub], trained: str) -> None:
    hub_of = fake(gradient=False)
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        setattr(hub_of.module, name, torch.no_grad()(getattr(hub_of.module, name)))
    model = axattn.apply(build("llama"), f"{FLASH}@v4")
    model.requires_grad_(not trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ids = tokens(1, 8)
    assert torch.allclose(model(ids).logits, build("llama")(ids).logits, atol=1e-4)
    with pytest.raises(UnsupportedAttentionError, match="no gradient"):
        model(ids, labels=ids).loss.backward()


def test_what_transformers_would_drop_is_refused_where_it_is_loaded(fake: Callable[..., Hub]) -> None:
    hub_of = fake()
    whole = hub_of.module.flash_attn_varlen_func
    hub_of.module.flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: q
    model = build("mistral")
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedAttentionError, match="takes no window_size, so Transformers would drop window"):
        axattn.apply(model, f"{FLASH}@v4")
    assert model.config._attn_implementation == before
    hub_of.module.flash_attn_varlen_func = whole
    axattn.apply(model, f"{FLASH}@v4")  # nothing of the refused one is left
    ids = tokens(1, 12)
    assert torch.allclose(model(ids).logits, build("mistral")(ids).logits, atol=1e-4)
    hub_of.module.flash_attn_func = None
    with pytest.raises(BackendUnavailableError, match="has no flash_attn_func"):
        axattn.apply(build("llama"), f"{FLASH}@v2")


def test_a_stand_in_that_fails_to_load_is_one_error_with_both_ways_out(
    fake: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(transformers_hub, "get_kernel", unreachable)
    with pytest.raises(BackendUnavailableError, match="no route to host") as caught:
        axattn.apply(build("llama"), "flash_attention_2")
    assert f"the hub kernel {FLASH}@v4 replaces its library" in str(caught.value)
    assert "Install the library of flash_attention_2, or make the hub reachable" in str(caught.value)


# ---- trust -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [True, False])
def test_trust_follows_the_mark_of_the_hub(
    fake: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, marked: bool
) -> None:
    fake()
    asked: list[str] = []
    monkeypatch.setattr(hub_kernels, "is_trusted", lambda publisher: bool(asked.append(publisher)) or marked)
    if marked:
        assert axattn.plan(build("llama"), "someone/flash").loads == {"": "someone/flash@v1"}
    else:
        with pytest.raises(BackendUnavailableError, match="someone is not a trusted publisher") as caught:
            axattn.plan(build("llama"), "someone/flash")
        assert "allow_all_kernels=True" in str(caught.value)
    assert asked == ["someone"]
    asked.clear()
    axattn.plan(build("llama"), f"{FLASH}@v4")
    axattn.plan(build("llama"), "someone/flash", allow_all_kernels=True)
    assert not asked


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(hub_cache, "is_offline", lambda: True)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert not hub_kernels.is_trusted("someone")
