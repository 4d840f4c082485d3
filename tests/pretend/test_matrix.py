"""A part of the conformance matrix on pretended GPUs; ``python -m tests.pretend`` runs all of it."""

from __future__ import annotations

import zlib

import pytest
import transformers

from tests.conformance import report
from tests.conformance.cells import every_key
from tests.pretend import matrix
from tests.sampling import part_of

TRAINS = ("packed gradients", "packed gradients, checkpointing", "gradients, right padding", "left padding")
SERVES = (
    "packed, many rows",
    "generate, left padding",
    "images in packed documents",
    "bf16 autocast over fp32 weights",
)
KERNELS = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers", "fp8", "sage")
SCENARIOS = {"auto": TRAINS + SERVES} | dict.fromkeys((*KERNELS, "auto, Hopper"), TRAINS[:1] + SERVES[:2])
RECORDED = report.load()
FAMILIES = {name: ("llama", "gemma3", "gpt_oss") for name in SCENARIOS if name != "auto"}
ON_TWO = ("packed gradients", "left padding", "packed, many rows")
KEYS = [
    (*key, place)
    for key in every_key()
    if key[2] in SCENARIOS.get(key[0], ()) and key[1] in FAMILIES.get(key[0], (key[1],))
    for place in (matrix.PLACES if key[2] in ON_TWO else matrix.PLACES[:1])
]


KEPT = [key for key in KEYS if key[1] == "llama" or zlib.crc32("/".join(key).encode()) % 48 == 0]
"""What ``make test`` runs: one model on everything, and a share of the others."""


@pytest.mark.parametrize("key", part_of(KEYS, KEPT, as_one="/".join))
def test_a_cell_is_right_or_refused_with_a_reason(key: tuple[str, str, str, str]) -> None:
    cell = matrix.run(*key)
    assert cell.status != "wrong", cell.detail
    assert cell.status == "ok" or cell.detail
    if RECORDED["versions"]["transformers"] == transformers.__version__:
        backend, family, scenario, _ = key
        assert cell.status == report.status(RECORDED["cells"][backend][scenario][family])
