from __future__ import annotations

import pytest
import torch

from axattn import backends
from axattn.backends.hub import hub_backend
from axattn.backends.varlen_engine.packed import packed_index
from axattn.errors import BackendUnavailableError, UnknownAttentionError
from axattn.machine.environment import Environment
from axattn.masks.varlen_layout import Layout, Span
from axattn.planning.planner import require_available, usable_exact
from axattn.spec.capability import Capability
from axattn.spec.names import CANONICAL, HubPath
from tests.environments import AMPERE, HOPPER, machine


def reasons_of(name: str, environment: Environment) -> list[str]:
    try:
        require_available(name, environment)
    except BackendUnavailableError as error:
        return [reason.text for reason in error.reasons]
    return []


def test_every_canonical_name_but_auto_has_a_backend_of_that_name() -> None:
    providers = {
        name
        for backend in map(backends.get, backends.builtin_names())
        for option in backend.options
        for name in option.backends.values()
    }
    canonical = {backends.get(name).name for name in CANONICAL if name != "auto"}
    assert canonical | providers == set(backends.builtin_names())
    assert all(isinstance(backends.get(name).capability, Capability) for name in backends.builtin_names())


def test_the_error_lists_every_reason_the_commands_that_fix_it_and_what_runs_instead() -> None:
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
        ("kernels-community/flash-attn2@v1", machine("cuda", 80, kernels="0.17.2"), "needs kernels >=0.18.2"),
        ("someone/kernel@v1", AMPERE, "not a trusted publisher"),
        ("kernels-community/flash-attn2@v1:fn", AMPERE, "refuses a function name"),
        ("paged|sdpa", AMPERE, "no longer takes"),
    ],
)
def test_hub_and_paged_requirements(path: str, environment: Environment, part: str) -> None:
    assert any(part in text for text in reasons_of(path, environment)), reasons_of(path, environment)


def test_hub_paths_pass_when_pinned_known_or_allowed() -> None:
    require_available("kernels-community/flash-attn2@v1", AMPERE)
    require_available("kernels-community/flash-attn2", AMPERE)  # at the version that Transformers loads
    require_available("someone/kernel@v1", AMPERE, trusted=frozenset({"someone"}))
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


def test_packed_queries_and_keys_of_one_length_share_one_tensor_of_lengths() -> None:
    """torch 2.15 takes cuDNN's kernel for causal rows only then (``torch.nn.attention.varlen``)."""
    square = Layout((Span(0, 1, 0, 3, 0, 3), Span(0, 1, 3, 8, 3, 8)), True, None, 1, 8, 8)
    index = packed_index(square, torch.device("cpu"))
    assert index.cu_q is index.cu_k
    assert index.cu_q.tolist() == [0, 3, 8]
    longer = Layout((Span(0, 1, 0, 3, 0, 5),), True, None, 1, 3, 5)
    index = packed_index(longer, torch.device("cpu"))
    assert (index.cu_q.tolist(), index.cu_k.tolist()) == ([0, 3], [0, 5])
