"""What each machine runs: every kernel on every kind of machine, each unmet requirement named with what fixes it."""

from __future__ import annotations

import pytest

import axattn
from axattn import backends
from axattn.errors import BackendUnavailableError
from axattn.machine.environment import Environment
from axattn.planning.planner import require_available
from axattn.spec import names
from tests.environments import ADA, AMPERE, BLACKWELL, CPU, HOPPER, NPU, ROCM5, ROCM6, TURING, machine
from tests.models import build

MACHINES = {
    "CPU": CPU,
    "Turing": TURING,
    "Ampere": AMPERE,
    "Ada": ADA,
    "Hopper": HOPPER,
    "Blackwell": BLACKWELL,
    "ROCm 5": ROCM5,
    "ROCm 6": ROCM6,
    "NPU": NPU,
}
NVIDIA = {"Turing", "Ampere", "Ada", "Hopper", "Blackwell"}
TORCH = {"CPU", "ROCm 5", "ROCm 6"} | NVIDIA
RUNS = {
    "auto": set(MACHINES),
    "varlen": TORCH,
    "eager": set(MACHINES),
    "sdpa": TORCH,
    "s2": TORCH,
    "flex_attention": TORCH,
    "flash_attention_2": {"Ampere", "Ada", "Hopper", "Blackwell", "ROCm 6"},
    "flash_attention_3": {"Hopper"},
    "flash_attention_4": {"Hopper", "Blackwell"},
    "xformers": NVIDIA,
    "sage": {"Ampere", "Ada", "Hopper", "Blackwell"},
    "fp8": {"Hopper"},
}
"""The machines (with every library) that run a kernel."""


def refusal(name: str, environment: Environment) -> BackendUnavailableError | None:
    try:
        require_available(name, environment)
    except BackendUnavailableError as error:
        return error
    return None


@pytest.mark.parametrize("machine_name", MACHINES)
@pytest.mark.parametrize("name", RUNS)
def test_a_kernel_runs_where_it_can_and_is_refused_elsewhere_with_what_runs_instead(
    name: str, machine_name: str
) -> None:
    error = refusal(name, MACHINES[machine_name])
    assert (error is None) is (machine_name in RUNS[name]), error
    if error is not None:
        assert error.reasons
        assert 'attn_implementation="auto"' in str(error)


def test_every_name_is_in_the_table() -> None:
    assert set(RUNS) == set(names.CANONICAL)


UNMET: dict[str, list[tuple[Environment, str, str]]] = {
    # name: machine, reason, fixing command
    "flash_attention_2": [
        (CPU, "needs an NVIDIA GPU (sm80 or newer) or an AMD GPU with ROCm 6.0+; this machine has CPU, no GPU", ""),
        (TURING, "is sm75, flash_attention_2 needs sm80 or newer", ""),
        (ROCM5, "ROCm 5.7 is older than 6.0", "install a torch build for ROCm 6.0 or newer"),
        (NPU, "this machine has NPU", ""),
        (machine("cuda", 80, flash_attn=None, kernels=None), "flash-attn is not installed", "pip install flash-attn"),
        (machine("cuda", 80, flash_attn=None, kernels=None), "kernels is not installed", 'pip install "kernels>='),
        (machine("cuda", 80, flash_attn="2.1", kernels=None), "flash-attn 2.1 is older than 2.3.3", "pip install"),
    ],
    "flash_attention_3": [
        (AMPERE, "is sm80, flash_attention_3 needs sm90 or newer", ""),
        (BLACKWELL, "flash_attention_3 is built for Hopper (sm90)", "flash_attention_4"),
        (ROCM6, "needs an NVIDIA GPU", ""),
        (machine("cuda", 90, flash_attn_3=None, kernels=None), "flash-attn-3 is not installed", "hopper/"),
    ],
    "flash_attention_4": [
        (ADA, "is sm89, flash_attention_4 needs sm90 or newer", ""),
        (
            machine("cuda", 100, flash_attn_4=None, kernels=None),
            "flash-attn-4 is not installed",
            "pip install --pre flash-attn-4",
        ),
        (machine("cuda", 90, quack_kernels="0.5.0"), "quack-kernels 0.5.0 is older", "pip install -U"),
        (machine("cuda", 90, nvidia_cutlass_dsl="4.4.0"), "nvidia-cutlass-dsl 4.4.0 is older", "pip install -U"),
        (machine("cuda", 90, nvidia_cutlass_dsl=None), "nvidia-cutlass-dsl is not installed", "pip install -U"),
    ],
    "flex_attention": [(machine("cuda", 80, torch="2.5.1"), "torch 2.5.1 is older than 2.6", "pip install -U torch")],
    "xformers": [
        (CPU, "needs an NVIDIA GPU (sm70 or newer)", ""),
        (ROCM6, "needs an NVIDIA GPU", ""),
        (machine("cuda", 60), "is sm60, xformers needs sm70 or newer", ""),
        (machine("cuda", 80, xformers=None), "xformers is not installed", "pip install xformers"),
        (machine("cuda", 80, xformers="0.0.33"), "xformers 0.0.33 is older than 0.0.35", "pip install xformers"),
        (machine("cuda", 80, cuda_runtime_12=None), "without CUDA 12's runtime", "nvidia-cuda-runtime-cu12"),
        (machine("cuda", 90, flash_attn=None), "FlashAttention 4 but not 2", "pip uninstall flash-attn-4"),
        (machine("cuda", 90, flash_attn="2.6.3"), "with flash-attn 2.6.3 installed", "flash-attn>=2.7.1,<=2.8.4"),
        (machine("cuda", 90, flash_attn="2.8.5"), "it takes 2.7.1 to 2.8.4", "XFORMERS_IGNORE_FLASH_VERSION_CHECK=1"),
    ],
    "sage": [
        (TURING, "is sm75, sage needs sm80 or newer", ""),
        (machine("cuda", 80, triton=None, sageattention=None), "triton is not installed", "pip install triton"),
        (machine("cuda", 80, triton="3.2", sageattention=None), "triton 3.2 is older than 3.3", "pip install triton"),
    ],
    "fp8": [
        (ADA, "is sm89, fp8 needs sm90 or newer", ""),
        (BLACKWELL, "FlashAttention 3 is built for Hopper (sm90)", ""),
        (ROCM6, "needs an NVIDIA GPU", ""),
        (machine("cuda", 90, torch="2.10"), "torch 2.10 is older than 2.11", "pip install -U torch"),
        (machine("cuda", 90, torchao="0.16.0"), "torchao 0.16.0 is older than 0.17", "pip install -U torchao"),
        (machine("cuda", 90, torchao=None), "torchao is not installed", "pip install -U torchao"),
        (
            machine("cuda", 90, flash_attn_3=None),
            "FlashAttention 3 (flash-attn-3 or fa3-fwd) is not",
            "pip install fa3-fwd",
        ),
    ],
    "sdpa": [(NPU, "sdpa runs on cpu, cuda, mps, xpu; this machine has npu", "")],
    "s2": [(NPU, "s2 runs on cpu, cuda; this machine has npu", "")],
}
CASES = [(name, *case) for name, cases in UNMET.items() for case in cases]


@pytest.mark.parametrize(
    ("name", "environment", "reason", "fixing"), CASES, ids=[f"{case[0]}: {case[2][:40]}" for case in CASES]
)
def test_an_unmet_requirement_is_named_with_what_fixes_it(
    name: str, environment: Environment, reason: str, fixing: str
) -> None:
    error = refusal(name, environment)
    assert error is not None
    (found,) = [r for r in error.reasons if reason in r.text]
    assert fixing in found.fix
    assert fixing in str(error)


def test_all_reasons_are_given_at_once() -> None:
    error = refusal("fp8", machine("cuda", 80, torch="2.10", torchao=None, flash_attn_3=None))
    assert error is not None
    assert len(error.reasons) == 4


@pytest.mark.parametrize("name", ["flash_attention_3", "fp8", "xformers", "sage"])
def test_a_model_is_untouched_by_a_refusal(name: str) -> None:
    model = build("llama")
    before = dict(vars(model)), model.config.to_dict(), model.config._attn_implementation
    with pytest.raises(BackendUnavailableError):
        axattn.apply(model, name)
    assert (dict(vars(model)), model.config.to_dict(), model.config._attn_implementation) == before
    assert not any("_axattn" in key for module in model.modules() for key in vars(module))


def test_either_fa3_package_serves_fp8() -> None:
    assert refusal("fp8", machine("cuda", 90, flash_attn_3=None, fa3_fwd="0.0.3")) is None


@pytest.mark.parametrize(("version", "softcap"), [("2.5.9", False), ("2.6.0", True), ("2.8.3.post2", True)])
def test_softcap_needs_flash_attn_2_6(version: str, softcap: bool) -> None:
    backend = backends.get("flash_attention_2")
    assert backend.capability_on(machine("cuda", 80, flash_attn=version)).softcap is softcap
