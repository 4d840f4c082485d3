from __future__ import annotations

import pytest

from axattn import backends
from axattn.backends.hub import hub_backend
from axattn.capability import Capability
from axattn.environment import Environment
from axattn.errors import BackendUnavailableError, UnknownAttentionError
from axattn.names import CANONICAL, HubPath
from axattn.planning import require_available, usable_exact
from tests.environments import ADA, AMPERE, BLACKWELL, CPU, HOPPER, NPU, ROCM5, ROCM6, TURING, machine


def reasons_of(name: str, environment: Environment) -> list[str]:
    try:
        require_available(name, environment)
    except BackendUnavailableError as error:
        return [reason.text for reason in error.reasons]
    return []


def test_every_canonical_name_but_auto_has_a_backend_of_that_name() -> None:
    assert {backends.get(name).name for name in CANONICAL if name != "auto"} == set(backends.builtin_names())
    assert all(isinstance(backends.get(name).capability, Capability) for name in backends.builtin_names())


def test_auto_takes_exact_kernels_only() -> None:
    assert all(backends.get(name).capability.exactness == "exact" for name in backends.AUTO_ORDER)


@pytest.mark.parametrize("environment", [TURING, ADA, HOPPER, ROCM6, CPU])
@pytest.mark.parametrize("name", ["varlen", "sdpa", "eager", "auto"])
def test_exact_fallbacks_run_everywhere(name: str, environment: Environment) -> None:
    assert reasons_of(name, environment) == []


@pytest.mark.parametrize(
    ("name", "environment", "part"),
    [
        ("flash_attention_2", CPU, "needs an NVIDIA GPU"),
        ("flash_attention_2", TURING, "sm75"),
        ("flash_attention_2", ROCM5, "ROCm 5.7 is older than 6.0"),
        ("flash_attention_2", machine("cuda", 80, flash_attn=None), "flash-attn is not installed"),
        ("flash_attention_2", machine("cuda", 80, flash_attn="2.1"), "flash-attn 2.1 is older"),
        ("flash_attention_2", NPU, "NPU"),
        ("flash_attention_3", AMPERE, "sm80"),
        ("flash_attention_3", machine("cuda", 90, flash_attn_3=None), "flash-attn-3 is not installed"),
        ("flash_attention_4", ADA, "sm89"),
        ("flash_attention_4", machine("cuda", 90, flash_attn_4=None), "flash-attn-4 is not installed"),
        ("flash_attention_3", ROCM6, "NVIDIA"),
        ("flex_attention", machine("cuda", 80, torch="2.5.1"), "torch 2.5.1 is older than 2.6"),
        ("xformers", machine("cuda", 60), "sm60"),
        ("xformers", machine("cuda", 80, xformers=None), "xformers is not installed"),
        ("sage", TURING, "sm75"),
        ("sage", machine("cuda", 80, sageattention=None), "sageattention is not installed"),
        ("fp8", ADA, "sm89"),
        ("fp8", machine("cuda", 90, torchao="0.16.0"), "torchao 0.16.0 is older than 0.17"),
        ("fp8", machine("cuda", 90, torch="2.10"), "torch 2.10 is older than 2.11"),
        ("fp8", machine("cuda", 90, flash_attn_3=None), "no FlashAttention 3 package"),
        ("sdpa", NPU, "npu"),
        ("s2", NPU, "npu"),
    ],
)
def test_an_unmet_requirement_is_named(name: str, environment: Environment, part: str) -> None:
    assert any(part in text for text in reasons_of(name, environment)), reasons_of(name, environment)


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("flash_attention_2", AMPERE),
        ("flash_attention_2", ROCM6),
        ("flash_attention_3", HOPPER),
        ("flash_attention_4", BLACKWELL),
        ("flex_attention", ADA),
        ("s2", AMPERE),
    ],
)
def test_a_machine_that_meets_all_requirements_is_accepted(name: str, environment: Environment) -> None:
    assert reasons_of(name, environment) == []


@pytest.mark.parametrize("name", ["sage", "fp8"])
def test_a_kernel_without_an_adapter_is_refused_even_where_its_library_runs(name: str) -> None:
    (reason,) = reasons_of(name, HOPPER)
    assert "no adapter" in reason
    assert backends.get(name).forward is None


def test_either_fa3_package_serves_fp8() -> None:
    texts = reasons_of("fp8", machine("cuda", 90, flash_attn_3=None, fa3_fwd="0.0.3"))
    assert not any("FlashAttention 3" in text for text in texts)


def test_the_error_lists_every_reason_the_mending_commands_and_what_runs_instead() -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        require_available("flash_attention_2", machine(flash_attn=None))
    assert len(caught.value.reasons) == 2
    assert "pip install flash-attn" in str(caught.value)
    assert "varlen, sdpa, eager" in str(caught.value)


def test_usable_exact_lists_no_lossy_kernel() -> None:
    assert not {"sage", "fp8", "s2"} & set(usable_exact(HOPPER))
    assert "flash_attention_3" in usable_exact(HOPPER)


@pytest.mark.parametrize(
    ("path", "environment", "part"),
    [
        ("kernels-community/flash-attn2@v1", machine("cuda", 80, kernels=None), "kernels is not installed"),
        ("kernels-community/flash-attn2@v1", machine("cuda", 80, kernels="0.17.2"), "loads kernels >=0.18.2"),
        ("kernels-community/flash-attn2", AMPERE, "no revision is pinned"),
        ("someone/kernel@v1", AMPERE, "not published by kernels-community"),
        ("kernels-community/sage-attention@v1", AMPERE, "no flash_attn_varlen_func"),
        ("kernels-community/flash-attn2@v1:fn", AMPERE, "refuses a function name"),
        ("paged|sdpa", AMPERE, "no longer takes"),
    ],
)
def test_hub_and_paged_requirements(path: str, environment: Environment, part: str) -> None:
    assert any(part in text for text in reasons_of(path, environment)), reasons_of(path, environment)


def test_hub_paths_pass_when_pinned_known_or_allowed() -> None:
    require_available("kernels-community/flash-attn2@v1", AMPERE)
    require_available("someone/kernel", AMPERE, allow_all_kernels=True)
    require_available("paged|sdpa", machine("cuda", 80, transformers="5.22.0"))
    require_available("paged|eager", AMPERE)
    assert hub_backend(HubPath("a/b")).forward is None


def test_the_kernels_window_follows_transformers() -> None:
    for transformers, kernels, fits in (
        ("5.17.0", "0.16.2", True),
        ("5.17.0", "0.17.2", False),
        ("5.21.0", "0.17.2", True),
    ):
        environment = machine("cuda", 80, transformers=transformers, kernels=kernels)
        assert (reasons_of("kernels-community/flash-attn2@v1", environment) == []) is fits


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(UnknownAttentionError, match="no backend named"):
        backends.get("nonsense")
