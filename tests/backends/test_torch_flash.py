"""torch's own flash operators: the stand-ins against torch's schema, and what a plan says that they run on."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

import axattn
from axattn.backends import get
from axattn.errors import BackendUnavailableError
from axattn.hf import torch_internals
from axattn.machine.environment import Environment
from tests.environments import AMPERE, BLACKWELL, CPU, HOPPER, ROCM6, TURING, machine
from tests.fakes import torch_flash
from tests.models import build


@pytest.mark.parametrize(
    ("operator", "fake"), torch_flash.FLASH_OPS.items(), ids=[str(operator) for operator in torch_flash.FLASH_OPS]
)
def test_the_stand_ins_take_what_torch_declares(operator: Any, fake: Any) -> None:
    declared = {argument.name: argument for argument in operator._schema.arguments}
    taken = inspect.signature(fake).parameters
    assert list(taken) == list(declared)
    for name, parameter in taken.items():
        argument = declared[name]
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) is argument.kwarg_only, name
        assert (parameter.default is inspect.Parameter.empty) is not argument.has_default_value(), name
        assert not argument.has_default_value() or parameter.default == argument.default_value, name


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_stand_ins_return_the_shapes_that_torch_says(backward: bool) -> None:
    """torch's own functions for meta tensors, called as axattn calls the operators."""

    def run(device: str) -> tuple[torch.Tensor, ...]:
        q, k, v = (torch.zeros(11, heads, 16, dtype=torch.bfloat16, device=device) for heads in (4, 2, 2))
        ends = (torch.tensor([0, 4, 11], dtype=torch.int32).to(device),) * 2
        out, logsumexp = torch_internals.flash_forward(q, k, v, ends, (7, 7), 0.3, (-1, 0))
        if not backward:
            return out, logsumexp
        return torch_internals.flash_backward(out, q, k, v, out, logsumexp, ends, (7, 7), 0.3, (-1, 0))

    kernels = torch.library.Library("aten", "IMPL")
    try:
        for operator, stand_in in torch_flash.FLASH_OPS.items():
            kernels.impl(operator, stand_in, "CPU")
        found = run("cpu")
    finally:
        kernels._destroy()
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in run("meta")]


def test_what_axattn_gives_varlen_attn_is_what_it_takes() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
    positional = [name for name, p in inspect.signature(varlen_attn).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


# ---- what a plan says --------------------------------------------------------------------------------------------


def note_of(environment: Environment) -> str:
    plan = axattn.plan(build("llama").config, "varlen", environment=environment)
    assert all(text in str(plan) for text in plan.sources)
    assert plan.to_dict()["sources"] == list(plan.sources)
    return "\n".join(plan.sources)


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        (
            AMPERE,
            ("packed rows run on FlashAttention 2, which torch ships", "first that serves them of FlashAttention 2"),
        ),
        (HOPPER, ("packed rows run on FlashAttention 2, which torch ships", "first that serves them of cuDNN, Flash")),
        (BLACKWELL, ("FlashAttention 2, which torch ships", "of cuDNN, Flash")),
        (machine("cuda", 120), ("FlashAttention 2, which torch ships", "first that serves them of FlashAttention 2")),
        (machine("cuda", 90, torch="2.15.0"), ("packed rows run on cuDNN or FlashAttention 2",)),
        (TURING, ("memory-efficient attention, packed rows document by document",)),
        (
            dataclasses.replace(HOPPER, flash_impl="FA3"),
            ("packed rows run on FlashAttention 3", "cuDNN, FlashAttention 3"),
        ),
    ],
)
def test_a_plan_says_what_whole_and_packed_rows_run_on(environment: Environment, parts: tuple[str, ...]) -> None:
    found = note_of(environment)
    assert all(part in found for part in parts), found


@pytest.mark.parametrize("environment", [CPU, ROCM6])
def test_without_an_nvidia_gpu_there_is_no_note(environment: Environment) -> None:
    assert note_of(environment) == ""


@pytest.mark.parametrize(
    ("environment", "impl", "part"),
    [
        (AMPERE, "FA3", "runs on sm9x only"),
        (BLACKWELL, "FA3", "runs on sm9x only"),
        (machine("cuda", 120, torch="2.14.0"), "FA4", "runs on sm9x and sm10x only"),
        (HOPPER, "FA4", "torch 2.13.0 can't call flash-attn-4"),
        (machine("cuda", 90, torch="2.14.0"), "FA4", ""),
        (HOPPER, "FA3", ""),
        (HOPPER, None, ""),
        (HOPPER, "a kernel of somebody's", ""),
        (CPU, "FA3", ""),
    ],
)
def test_what_a_process_puts_in_the_place_of_torchs_kernels_is_known(
    environment: Environment, impl: str | None, part: str
) -> None:
    environment = dataclasses.replace(environment, flash_impl=impl)
    assert Environment.from_dict(environment.to_dict()) == environment
    reasons = get("varlen").probe(environment)
    if not part:
        assert reasons == []
        return
    assert part in reasons[0].text
    with pytest.raises(BackendUnavailableError, match="restore_flash_attention_impl"):
        axattn.plan(build("llama").config, "varlen", environment=environment)


def test_an_activation_after_the_machine_was_probed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import _registry

    from axattn.machine import environment

    monkeypatch.setattr(environment, "_probe", lambda: HOPPER)
    assert Environment.current() is HOPPER
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", ("FA3", None))
    assert Environment.current().flash_impl == "FA3"


def test_torchs_own_overrides_serve_the_machines_that_axattn_names() -> None:
    """`torch_flash._SERVES`, by torch's checks: each override asked with every major architecture."""
    from torch.nn.attention import _fa3, _fa4

    from axattn.backends import torch_flash as record

    class OnGpu(torch.Tensor):
        is_cuda = True

    x = torch.zeros(4, 2, 16, dtype=torch.bfloat16).as_subclass(OnGpu)
    cu = torch.zeros(2, dtype=torch.int32)
    for impl, module, ask in (
        ("FA3", _fa3, lambda: _fa3._fa3_common_support_error(x, (x,), 0.0, cu, None, None, None)),
        ("FA4", _fa4, lambda: _fa4._fa4_common_support_error(x, (x,), cu)),
    ):
        for major in (7, 8, 9, 10, 11, 12):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "_get_device_major", lambda device, major=major: major)
                patch.setattr(torch.cuda, "is_available", lambda: True)
                assert (ask() is None) is (major in record._SERVES[impl]), (impl, major)
