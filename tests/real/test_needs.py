from __future__ import annotations

import pytest

from axattn import backends
from axattn.machine.presets import machine
from axattn.spec.capability import missing
from tests.real.needs import served

RUNS_ON = {
    "varlen": "sm80",
    "sdpa": "cpu",
    "eager": "cpu",
    "s2": "sm80",
    "flash_attention_2": "sm80",
    "flash_attention_3": "sm90",
    "flash_attention_4": "sm100",
    "flex_attention": "sm80",
    "xformers": "sm80",
    "sage": "sm89",
    "sage:library": "sm80",
    "fp8": "sm90",
}


@pytest.mark.parametrize("name", backends.builtin_names())
def test_the_grid_holds_something_for_each_kernel_and_not_too_much(name: str) -> None:
    pairs, triples = list(served(name, RUNS_ON[name], thin=2)), list(served(name, RUNS_ON[name], thin=3))
    assert 10 < len(pairs) < 300
    assert len(pairs) < len(triples) < 2000
    assert set(pairs) < set(triples)
    assert len(set(triples)) == len(triples)
    record = backends.get(name).called_capability_on(machine(RUNS_ON[name]))
    assert not any(missing(need, record) for need in triples)


def test_nothing_is_served_where_the_probe_says_no() -> None:
    assert list(served("flash_attention_3", "sm80")) == []
