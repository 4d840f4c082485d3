"""AMD GPUs: what flash-attn's two backends ignore there is refused, and torch's MATH kernel is named where it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import axattn
from axattn.backends import get
from axattn.errors import UnsupportedAttentionError
from axattn.machine.environment import Environment
from axattn.planning.diagnosis import diagnose
from axattn.spec.capability import Need, missing
from tests.environments import AMPERE, CPU, HOPPER, ROCM6
from tests.fakes.machine import hopper
from tests.models import build, tokens

TRITON = dataclasses.replace(ROCM6, flash_attn_triton=True)
NAME = "flash_attention_2"


@pytest.mark.parametrize(
    ("machine", "refused"),
    [
        (AMPERE, set()),
        (ROCM6, {"softcap"}),
        (TRITON, {"softcap", "window", "dropout"}),
        (dataclasses.replace(AMPERE, flash_attn_triton=True), {"softcap", "window", "dropout"}),  # wherever it is set
    ],
)
def test_what_a_backend_of_flash_attn_ignores_is_refused(machine: Environment, refused: set[str]) -> None:
    served = get(NAME).capability_on(machine)
    asked: dict[str, Any] = {"softcap": 50.0, "window": 8, "dropout": 0.1}
    for feature, value in asked.items():
        reasons = missing(Need(head_dim=64, **{feature: value}), served, NAME)
        assert bool(reasons) == (feature in refused), feature
        assert all("ignores it" in reason.text for reason in reasons)


@pytest.mark.parametrize(("family", "machine"), [("gemma2", ROCM6), ("mistral", TRITON)])
def test_plans_refuse_it_where_transformers_runs_the_name_and_auto_finds_another(
    family: str, machine: Environment
) -> None:
    config = build(family).config
    with pytest.raises(UnsupportedAttentionError, match="ignores it"):
        axattn.plan(config, NAME, environment=machine)
    planned = axattn.plan(config, "auto", environment=machine)
    assert NAME not in {layer.chosen for layer in planned.layers}
    assert axattn.plan(build("llama").config, NAME, environment=machine).running == {"": NAME}


def test_windowed_layers_run_elsewhere_where_it_is_allowed() -> None:
    with hopper(NAME) as machine, pytest.MonkeyPatch.context() as monkeypatch:  # undone before hopper's own
        here = dataclasses.replace(machine, flash_attn_triton=True)
        monkeypatch.setattr(Environment, "current", classmethod(lambda cls: here))
        model = axattn.apply(build("mistral"), NAME, on_unsupported="route")
        with torch.no_grad():
            model(tokens(1, 12))
        assert {kernel for layer in axattn.status(model).layers for kernel in layer.served} == {"varlen"}


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (dataclasses.replace(ROCM6, gfx="gfx1151", torch_flash=False), "does not run on gfx1151"),
        (ROCM6, "other than gfx90a, gfx942 and gfx950"),
        (dataclasses.replace(ROCM6, gfx="gfx942", torch_flash=True), ""),
        (HOPPER, ""),
        (CPU, ""),
    ],
)
def test_doctor_and_plan_name_the_math_kernel(machine: Environment, said: str) -> None:
    variable = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1"
    notices = {kernel.name: kernel.notice for kernel in diagnose(machine).kernels}
    plan = axattn.plan(build("llama").config, "varlen", environment=machine)
    for text in (notices["varlen"], notices["sdpa"], str(plan)):
        assert (variable in text) == bool(said)
        assert said in text
    assert not notices["eager"]


def test_a_machine_is_described_whole() -> None:
    machine = dataclasses.replace(TRITON, gfx="gfx1151", torch_flash=False)
    assert Environment.from_dict(machine.to_dict()) == machine
    assert "gfx1151" in machine.describe()
