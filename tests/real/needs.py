"""What axattn's records promise, as a list: every `Need` of a fixed grid that a kernel's record serves on a machine.

The tests beside this file pass each of them to the library's own code. No library is asked here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from axattn import backends
from axattn.machine.environment import Environment
from axattn.machine.presets import machine as machine_by_name
from axattn.spec.capability import Need, missing

HEADS, WINDOW, CHUNK, SOFTCAP, DROPOUT = 8, 96, 64, 30.0, 0.1
GRID: dict[str, tuple[Any, ...]] = {
    # the plainest of each comes first
    "head_dim": (64, 128, 32, 40, 80, 96, 192, 208, 256, 512),
    "value_dim": (None, 64, 128, 512),
    "dtype": ("bfloat16", "float16", "float32"),
    "kv_heads": (HEADS, 2),
    "causal": (True, False),
    "local": ({}, {"window": WINDOW}, {"chunk": CHUNK}),
    "softcap": (None, SOFTCAP),
    "sinks": (False, True),
    "dropout": (0.0, DROPOUT),
    "cross_lengths": (False, True),
    "gradient": (False, True),
}


def served(backend: str, machine: str | Environment, thin: int | None = None) -> Iterator[Need]:
    """Every need of `GRID` that a kernel's record serves on a machine; none where its probe rules the machine out.

    Args:
        backend: a name, such as ``"flash_attention_4"``.
        machine: a name, such as ``"sm90"`` (`axattn.machine.presets.NAMES`), or one described.
        thin: at most so many fields that are not the plainest: 2 for every pair of features, 3 for every triple. A
            dtype or a head dim counts as one, so that ``"float16"`` with a window in training is a triple. None for the
            whole grid, a second and up to 36,000 needs.
    """
    found = backends.get(backend)
    environment = machine if isinstance(machine, Environment) else machine_by_name(machine)
    if found.probe(environment):
        return
    capability = found.called_capability_on(environment)
    for chosen in _combinations(thin):
        need = Need(
            **{name: value for name, value in chosen.items() if name != "local"},
            **chosen["local"],
            heads=HEADS,
            device=environment.torch_device,
        )
        same = need.value_dim == need.head_dim  # None already says so
        chunk_is_causal = need.chunk is None or need.causal
        if not same and chunk_is_causal and not missing(need, capability):
            yield need


def _combinations(thin: int | None) -> Iterator[dict[str, Any]]:
    plain = {name: values[0] for name, values in GRID.items()}
    most = len(GRID) if thin is None else thin
    for count in range(most + 1):
        for names in itertools.combinations(GRID, count):
            for values in itertools.product(*(GRID[name][1:] for name in names)):
                yield {**plain, **dict(zip(names, values, strict=True))}
