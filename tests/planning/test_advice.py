"""The commands at the end of `axattn doctor`, on machines that lack different things."""

from __future__ import annotations

import pytest

from axattn.machine.environment import Environment
from axattn.machine.presets import NAMES
from axattn.machine.presets import machine as preset
from axattn.planning.advice import MEASURE, advice
from axattn.planning.ranking import usable
from tests.environments import machine


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_gets_one_or_two_commands(name: str) -> None:
    found = advice(preset(name))
    assert 1 <= len(found) <= 2
    assert found[-1].command == MEASURE
    assert usable(preset(name))[0] in found[-1].gain


def test_the_missing_kernel_that_ranks_first_is_named_with_its_command() -> None:
    first = advice(machine("cuda", 100, flash_attn_4=None))[0]
    assert first.command == "pip install --pre flash-attn-4"
    assert '"auto" would run flash_attention_4 before varlen' in first.gain
    assert usable(machine("cuda", 100))[0] == "flash_attention_4"  # what is promised is what then happens


def test_a_library_that_no_command_installs_is_replaced_by_its_hub_kernel() -> None:
    first = advice(machine("cuda", 90, flash_attn_3=None, flash_attn_4=None, kernels=None))[0]
    assert first.command.startswith('pip install "kernels')
    assert "(" not in first.command
    assert 'attn_implementation="flash_attention_3" would run the hub kernel' in first.gain


def test_a_kernel_that_ranks_after_one_that_runs_is_not_advised() -> None:
    ampere = machine("cuda", 80, flash_attn=None, xformers=None)
    assert [one.command for one in advice(ampere)] == [MEASURE]


def test_what_no_command_gives_is_not_advised() -> None:
    cpu = machine("cpu", flash_attn=None, xformers=None)
    assert [one.command for one in advice(cpu)] == [MEASURE]


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_without_torch_or_transformers_that_comes_first(library: str) -> None:
    libraries = {name: "9" for name in ("torch", "transformers") if name != library}
    found = advice(Environment("cpu", libraries=libraries))
    assert [one.command for one in found] == [f"pip install {library}"]


def test_a_driver_that_torch_was_not_built_for_comes_first() -> None:
    found = machine("cpu", torch="2.13.0+cpu")
    assert advice(found, nvidia_driver=True)[0].command == "pip install --force-reinstall torch"
    assert [one.command for one in advice(found)] == [MEASURE]
