"""The order of ``auto``: exact kernels, each with its source, what is installed, and what a call needs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import axattn
from axattn import backends
from axattn.machine.environment import Environment
from axattn.planning import planner
from axattn.planning.plan import Policy
from axattn.planning.ranking import PREFERENCES, by_need, ranking, usable
from axattn.planning.routes import Route
from axattn.spec.capability import Need, missing
from axattn.traits.layer_needs import model_needs
from tests.conformance.families import FAMILIES
from tests.environments import ADA, AMPERE, BLACKWELL, CPU, HOPPER, NPU, ROCM6, TURING, machine
from tests.fakes.machine import hopper
from tests.models import build, tokens

MACHINES = {
    "cpu": CPU,
    "turing": TURING,
    "ampere": AMPERE,
    "ada": ADA,
    "hopper": HOPPER,
    "blackwell": BLACKWELL,
    "consumer blackwell": machine("cuda", 120),
    "rocm": ROCM6,
    "npu": NPU,
}


@pytest.mark.parametrize("environment", MACHINES.values(), ids=MACHINES)
def test_every_order_holds_exact_kernels_that_axattn_can_call_and_ends_with_those_that_serve_all(
    environment: Environment,
) -> None:
    names = [rank.name for rank in ranking(environment)]
    assert all(backends.get(name).capability.exactness == "exact" for name in names)
    assert all(backends.get(name).forward is not None for name in names)
    assert names[-2:] == ["sdpa", "eager"]
    assert len(set(names)) == len(names)
    assert all(rank.source for rank in ranking(environment))


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        (CPU, "varlen"),
        (TURING, "varlen"),
        (AMPERE, "varlen"),
        (ADA, "varlen"),
        (HOPPER, "flash_attention_3"),
        (machine("cuda", 90, flash_attn_3=None), "flash_attention_4"),
        (machine("cuda", 90, flash_attn_3=None, flash_attn_4=None), "varlen"),
        (BLACKWELL, "flash_attention_4"),
        (machine("cuda", 100, flash_attn_4=None), "varlen"),
        (machine("cuda", 120), "varlen"),
        (ROCM6, "varlen"),
    ],
)
def test_the_first_is_the_fastest_that_is_installed(environment: Environment, first: str) -> None:
    assert usable(environment)[0] == first
    assert usable(environment) is usable(environment)


GEMMA = {"head_dim": 256, "heads": 8, "kv_heads": 4}


@pytest.mark.parametrize(
    ("sm", "fields", "first"),
    [
        (90, {**GEMMA, "window": 512, "gradient": True}, "flash_attention_3"),
        (100, {**GEMMA, "window": 512}, "flash_attention_4"),
        (100, {**GEMMA, "window": 512, "gradient": True}, "varlen"),
        (100, {**GEMMA, "softcap": 50.0, "gradient": True}, "flash_attention_2"),
        (100, {"head_dim": 64, "sinks": True, "gradient": True}, "flash_attention_4"),
        (120, {"head_dim": 64, "sinks": True}, "varlen"),
        (100, {"head_dim": 256, "sinks": True, "gradient": True}, "varlen"),
        (80, {"head_dim": 64, "sinks": True, "gradient": True}, "varlen"),
        (90, {"head_dim": 64, "sinks": True, "gradient": True}, "flash_attention_3"),
        (120, GEMMA, "varlen"),
        (120, {"head_dim": 64, "softcap": 30.0, "gradient": True}, "flash_attention_2"),
        (120, {"head_dim": 256, "softcap": 30.0}, "flash_attention_2"),
    ],
)
def test_auto_takes_no_kernel_that_would_raise(sm: int, fields: dict[str, Any], first: str) -> None:
    """What flash-attn-4 4.0.0b36 lacks on each Blackwell."""
    there, need = machine("cuda", sm), Need(**fields, dtype="bfloat16", device="cuda")
    order = by_need(usable(there), need)
    assert (
        next(name for name in order if not missing(need, backends.get(name).called_capability_on(there), name)) == first
    )


def test_on_consumer_blackwell_no_reason_names_the_tensor_memory_that_it_lacks() -> None:
    ranks = {rank.name: rank.source for rank in ranking(machine("cuda", 120))}
    assert list(ranks).index("flash_attention_2") < list(ranks).index("flash_attention_4")
    assert not any("its tensor memory" in source for source in ranks.values())


def test_kernels_that_only_other_machines_run_are_not_tried() -> None:
    assert not {"flash_attention_3", "flash_attention_4"} & set(usable(AMPERE))
    assert "flash_attention_3" not in usable(BLACKWELL)
    assert usable(machine("cuda", 80, flash_attn=None, xformers=None)) == ("varlen", "sdpa", "eager")


@pytest.mark.parametrize(
    ("need", "first"),
    [
        (Need(head_dim=64, device="cuda"), "varlen"),
        (Need(head_dim=64, device="cuda", dropout=0.1), "flash_attention_2"),
        (Need(head_dim=64, device="cuda", dtype="float32"), "xformers"),
        (Need(head_dim=512, device="cuda"), "xformers"),
        (Need(head_dim=64, device="cpu", dropout=0.1), "varlen"),
    ],
)
def test_some_calls_have_an_order_of_their_own(need: Need, first: str) -> None:
    order = by_need(usable(AMPERE), need)
    assert order[0] == first
    assert sorted(order) == sorted(usable(AMPERE))
    assert by_need(("varlen", "eager"), need) == ("varlen", "eager")


def test_preferences_name_kernels_of_the_orders() -> None:
    names = {rank.name for rank in ranking(AMPERE)}
    assert {rule.name for rule in PREFERENCES} | {rule.before for rule in PREFERENCES} <= names


def test_the_plan_says_why_not_the_faster_kernels() -> None:
    plan = planner.plan(
        model_needs(build("llama").config), "auto", machine("cuda", 90, flash_attn_3=None, flash_attn_4=None), Policy()
    )
    first = plan.layers[0]
    assert first.chosen == "varlen"
    assert [r.backend for r in first.rejected] == ["flash_attention_3", "flash_attention_4"]
    assert all("is not installed" in r.reasons[0].text for r in first.rejected)


def test_layers_get_what_serves_them(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2's softcap leaves eager where a flash kernel has it; gpt-oss's sinks run on the first of all."""
    for family, installed, wanted in (
        ("gemma2", "flash_attention_2", "flash_attention_2"),
        ("gemma2", "flash_attention_3", "flash_attention_3"),
        ("gpt_oss", "flash_attention_4", "flash_attention_4"),
        ("gpt_oss", "flash_attention_3", "flash_attention_3"),
        ("gpt_oss", "xformers", "varlen"),
        ("mistral", "flash_attention_3", "flash_attention_3"),
        ("mistral", "xformers", "varlen"),
    ):
        with hopper(installed), caplog.at_level(logging.WARNING, "axattn"):
            model = axattn.apply(FAMILIES[family].make(), "auto")
            with torch.no_grad():
                found = model(tokens(1, 12)).logits
            layers = axattn.status(model).layers
            assert {layer.planned for layer in layers} == {wanted}
            assert all(set(layer.served) == {wanted} for layer in layers), (family, installed, layers[0])
        reference = FAMILIES[family].make()
        reference.set_attn_implementation("eager")
        assert torch.allclose(found, reference(tokens(1, 12)).logits, atol=1e-4)
    assert not [record for record in caplog.records if record.name == "axattn"]  # served as planned: nothing to say


def test_inside_a_compiled_graph_a_kernel_that_traces_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with hopper("flash_attention_4"):
        route = Route("auto", "layer", ("flash_attention_4", "varlen", "sdpa", "eager"), "flash_attention_4")
        need = Need(head_dim=64, device="cpu", dtype="float32")
        assert route.choose(need).name == "flash_attention_4"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert route.choose(need).name == "varlen"
