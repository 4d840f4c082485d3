"""The arithmetic of a plan's costs, against counting pairs one by one."""

from __future__ import annotations

import itertools

import pytest

from axattn.errors import InvalidConfigError
from axattn.machine.presets import NAMES, machine
from axattn.planning.estimates import computed_flops, estimate, total
from axattn.planning.plan import LayerPlan, Plan
from axattn.spec.capability import Need
from axattn.traits.layer_needs import LayerNeed


def entry(chosen: str = "varlen", **need: object) -> LayerPlan:
    needs = Need(**{"head_dim": 64, "heads": 8, "kv_heads": 2, **need})  # type: ignore[arg-type]
    return LayerPlan(LayerNeed("", 0, "full_attention", needs), chosen, chosen)


def pairs(length: int, causal: bool, window: int | None, chunk: int | None) -> int:
    return sum(
        (not causal or k <= q)
        and (window is None or (q - k < window and k - q < window))
        and (chunk is None or q // chunk == k // chunk)
        for q, k in itertools.product(range(length), range(length))
    )


@pytest.mark.parametrize("length", [1, 7, 20])
@pytest.mark.parametrize(
    ("causal", "window", "chunk"),
    [(True, None, None), (True, 5, None), (True, 50, None), (True, None, 6), (False, None, None)],
)
def test_flops_count_every_pair(length: int, causal: bool, window: int | None, chunk: int | None) -> None:
    found = estimate(entry(causal=causal, window=window, chunk=chunk, value_dim=32), length)
    assert found.flops == 2 * 8 * (64 + 32) * pairs(length, causal, window, chunk)
    kept = min(length, window or chunk or length)
    assert found.kv_bytes == 2 * 2 * (64 + 32) * kept


def test_the_extra_memory_of_a_kernel() -> None:
    assert estimate(entry("varlen"), 100).extra_bytes == 0
    assert estimate(entry("sdpa"), 100).extra_bytes == 0
    assert estimate(entry("sdpa", window=10), 100).extra_bytes == 100 * 100
    assert estimate(entry("eager"), 100).extra_bytes == 8 * 100 * 100 * 6
    assert estimate(entry("eager", chunk=30), 100).extra_bytes == 8 * (3 * 30 * 30 + 10 * 10) * 6
    assert estimate(entry("sdpa", chunk=30), 100).extra_bytes == 0


def test_kernels_that_form_every_pair_compute_the_masked_ones_too() -> None:
    assert computed_flops(entry("varlen"), 100) == estimate(entry("varlen"), 100).flops
    assert computed_flops(entry("sdpa"), 100) == estimate(entry("varlen"), 100).flops  # the causal flag skips them
    every = 2 * 8 * (64 + 64) * 100 * 100
    assert computed_flops(entry("eager"), 100) == computed_flops(entry("sdpa", window=10), 100) == every
    assert computed_flops(entry("eager", chunk=30), 100) == 2 * 8 * (64 + 64) * (3 * 30 * 30 + 10 * 10)


def test_a_model_is_the_sum_of_its_layers_and_the_one_that_needs_most_memory() -> None:
    plan = Plan("m", machine("cpu"), {}, {}, (entry("varlen"), entry("eager")), "raise")
    found = total(plan, 100)
    assert found.flops == 2 * estimate(entry(), 100).flops
    assert found.extra_bytes == estimate(entry("eager"), 100).extra_bytes


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_that_is_none_is_refused(length: int) -> None:
    with pytest.raises(InvalidConfigError, match="is not a length"):
        estimate(entry(), length)


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_survives_its_own_description(name: str) -> None:
    found = machine(name)
    assert type(found).from_dict(found.to_dict()).to_dict() == {**found.to_dict(), "gpu": found.gpu}
