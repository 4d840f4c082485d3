from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers

from axattn.machine.environment import Environment
from tests.environments import CPU, HOPPER, ROCM6, machine


def test_this_machine_is_probed_once_and_as_it_is() -> None:
    here = Environment.current()
    assert here is Environment.current()
    assert here.libraries["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a wheel may name its CUDA alone
    assert here.libraries["transformers"] == transformers.__version__
    assert (here.torch_device == "cuda") == torch.cuda.is_available()


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CPU.device = "cuda"  # type: ignore[misc]


def test_versions_compare_without_local_suffixes() -> None:
    here = machine(torch="2.11.0+cpu", flash_attn="garbage")
    assert here.has("torch", "2.11")
    assert not here.has("torch", "2.12")
    assert here.has("flash_attn")
    assert not here.has("flash_attn", "2.0")
    assert not here.has("nothing")


def test_it_says_what_it_is() -> None:
    assert HOPPER.sm == 90
    assert "sm90" in HOPPER.describe()
    assert ROCM6.torch_device == "cuda"
    assert "ROCm 6.2" in ROCM6.describe()
    assert CPU.describe() == "CPU, no GPU"


def test_the_json_holds_no_paths() -> None:
    text = json.dumps(Environment.current().to_dict())
    assert "/" not in text
