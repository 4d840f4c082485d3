"""The record of FlashAttention 4 against the checks of flash-attn-4 itself; the compiles are in `tests.real.fa4`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from axattn import backends
from axattn.machine.presets import machine
from axattn.spec.capability import Need, missing
from tests.real import fa4

pytestmark = pytest.mark.skipif(not fa4.there(), reason=f"flash-attn-4 has not been fetched: {fa4.FETCH}")

REFUSED: dict[str, list[dict[str, Any]]] = {
    "sm90": [{"head_dim": 264}, {"head_dim": 12}, {"head_dim": 128, "dtype": "float32"}],
    "sm100": [
        {"head_dim": 256, "window": 96, "gradient": True},
        {"head_dim": 256, "softcap": 30.0, "gradient": True},
        {"head_dim": 256, "sinks": True, "gradient": True},
        {"head_dim": 136},
        {"head_dim": 192},
        {"head_dim": 192, "value_dim": 128},
    ],
    "sm120": [{"head_dim": 64, "sinks": True}, {"head_dim": 200}, {"head_dim": 168, "gradient": True}],
}
SERVED: dict[str, list[dict[str, Any]]] = {
    "sm90": [{"head_dim": 256, "window": 96, "softcap": 30.0, "sinks": True, "gradient": True}],
    "sm100": [{"head_dim": 256, "gradient": True}, {"head_dim": 256, "window": 96, "softcap": 30.0, "sinks": True}],
    "sm120": [{"head_dim": 192, "window": 96}, {"head_dim": 160, "softcap": 30.0, "window": 96, "gradient": True}],
}


@pytest.mark.parametrize("name", fa4.ARCHITECTURES)
def test_the_library_takes_what_the_record_serves(name: str) -> None:
    asked = list(fa4.ask(name, thin=2))
    assert len(asked) > 50
    assert [one for one in asked if one.refusal] == []


@pytest.mark.parametrize("name", fa4.ARCHITECTURES)
def test_the_library_and_the_record_agree_at_the_edges(name: str) -> None:
    """No refusal of axattn is untrue."""
    record = backends.get("flash_attention_4").capability_on(machine(name))
    for fields, refused in [(one, True) for one in REFUSED[name]] + [(one, False) for one in SERVED[name]]:
        need = Need(**{**fa4.PLAIN, **fields})
        assert bool(missing(need, record)) is refused, fields
    asked = list(fa4.ask(name, needs=json.dumps(REFUSED[name] + SERVED[name])))
    assert [bool(one.refusal) for one in asked] == [True] * len(REFUSED[name]) + [False] * len(SERVED[name]), asked
