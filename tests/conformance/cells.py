"""Runs one cell of the matrix: ok, refused with the reason, or wrong."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal
from unittest import mock

import torch

from axattn.backends import by_document
from axattn.errors import AxattnError
from tests.conformance.cases import Case, Result
from tests.conformance.families import FAMILIES
from tests.conformance.scenarios import SCENARIOS
from tests.fakes.machine import FLASH, hopper
from tests.sampling import OLDEST, SAMPLE

ON_THIS_MACHINE = ("auto", "varlen", "s2", "eager", "sdpa", "flex_attention")
_FLASH = tuple(f"flash_attention_{n}{policy}" for n in (2, 3, 4) for policy in ("", ", route"))
OVER_FAKES = (*_FLASH, "xformers", "xformers, route", "fp8", "fp8, route", "sage", "sage, route", "auto, Hopper")
BACKENDS = (*ON_THIS_MACHINE, *OVER_FAKES)
"""Names under test; ``NAME, route`` is ``on_unsupported="route"``; kernels that need a GPU are strict fakes.

``auto, Hopper`` is ``auto`` on a machine that has them all.
"""


UPSTREAM = {
    ("generate, static cache", "'BlockMask' object has no attribute 'contiguous'"),  # flex_attention, 5.23
    (  # Llama 4 on any name, 5.17
        "generate, static cache",
        "create_chunked_causal_mask() got an unexpected keyword argument 'block_sequence_ids'",
    ),
}
"""Errors that Transformers raises in its own `generate`, before axattn sees a call: loud, and not axattn's to catch."""


@dataclass(frozen=True)
class Cell:
    """The outcome of one backend, family and scenario.

    Attributes:
        status: ``ok``, ``refused`` or ``wrong``.
        error: largest relative error over all that was compared, None when nothing was.
        detail: the reason of a refusal, or what was wrong.
    """

    backend: str
    family: str
    scenario: str
    status: Literal["ok", "refused", "wrong"]
    error: float | None = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return asdict(self)


def every_key() -> Iterator[tuple[str, str, str]]:
    """Every cell of the matrix: ``(backend, family, scenario)``."""
    for backend in BACKENDS:
        # a fake is not code that torch.compile should see; flex_attention's masks warn where dynamo can't follow
        traced = backend in ON_THIS_MACHINE and backend != "flex_attention"
        for family in FAMILIES.values():
            if family.kind == "refused":
                yield backend, family.name, "dense"
                continue
            for scenario in SCENARIOS.values():
                if scenario.name == "compiled, fullgraph" and not traced:
                    continue
                if scenario.name == OVER_RANKS and backend not in _OVER_RANKS:
                    continue
                if backend == "s2" and "gradients" in scenario.name:
                    continue  # sparse in training by definition: tests/backends/test_s2.py has the paper's rule
                if family.kind in scenario.kinds and not scenario.applies(family):
                    yield backend, family.name, scenario.name


OVER_RANKS = "two ranks, keys fetched, gradients"
_OVER_RANKS = ("auto", "varlen", "xformers", "fp8", "sage", "auto, Hopper")
"""Tried in processes of their own, a few seconds a cell: native names are refused there, whatever the family."""
SHARE = {"auto": 5, "varlen": 24, "s2": 48, "eager": 24, "sdpa": 24, "flex_attention": 140}
"""One cell in how many ``make test`` runs; of the fakes one in `_OF_FAKES`."""
_OF_FAKES = 96
_NIGHTLY = {"auto": 1, "varlen": 4, "s2": 8, "eager": 4, "sdpa": 4, "flex_attention": 40}
_COMPILED = {"test": (), "thin": ("llama",), "nightly": ("llama", "gemma3", "gpt_oss")}  # seconds each


def sampled(key: tuple[str, str, str]) -> bool:
    """Whether a cell is in the part that the tests run, always the same: a fifth of ``auto``, a share of the others."""
    backend, family, scenario = key
    if scenario == "compiled, fullgraph":
        return backend == "auto" and family in (("llama",) if OLDEST else _COMPILED[SAMPLE])
    number = zlib.crc32("/".join(key).encode())
    if SAMPLE == "nightly":
        return number % _NIGHTLY.get(backend, 12) == 0
    share = 48 if scenario == OVER_RANKS else SHARE.get(backend, _OF_FAKES)
    if FAMILIES[family].kind == "refused" or len(SCENARIOS[scenario].kinds) == 1:  # few cells a name
        share = 1 if backend == "auto" else min(share, 6)
    if SAMPLE == "thin":
        return number % (2 * share) == 0
    return number % (5 * share) == 1 if OLDEST else number % share == 2 % share


def error(found: Result, expected: Result) -> tuple[float, str]:
    """The largest relative error, and where: over rows ``[..., n]``, the norm of the difference by the norm expected.

    A row whose expected norm is below a thousandth of the largest counts as if it had that norm.
    """
    worst, where = 0.0, ""
    if found.keys() != expected.keys():
        return float("inf"), f"{sorted(found.keys() ^ expected.keys())} given on one side only"
    floor = {name: 1e-3 * max(1e-9, t.norm(dim=-1).max().item()) for name, t in expected.items()}
    gradients = [name for name in expected if name.startswith("d ")]
    shared = max((floor[name] for name in gradients), default=0.0)
    for name, wanted in expected.items():
        got = found[name]
        if got.shape != wanted.shape:
            return float("inf"), f"{name}: shape {list(got.shape)} is not {list(wanted.shape)}"
        scale = wanted.norm(dim=-1).clamp(min=shared if name in gradients else floor[name])
        each = (got - wanted).norm(dim=-1) / scale
        value = each.max().item()
        value = float("inf") if math.isnan(value) else value
        if value > worst:
            worst, where = value, name
    return worst, where


def run(backend: str, family: str, scenario: str) -> Cell:
    """Run one cell. Errors of axattn's own are refusals; any other exception is wrong.

    What no varlen kernel serves runs document by document, as in rows that are long enough for it to pay.
    """
    with mock.patch.dict(by_document.CALL, cpu=0, gpu=0):
        if backend in OVER_FAKES:
            with hopper(*fakes_of(backend)):
                return _run(backend, family, scenario)
        return _run(backend, family, scenario)


def fakes_of(backend: str) -> tuple[str, ...]:
    """The libraries that stand in for those that a name under test needs."""
    if backend == "auto, Hopper":
        return (*FLASH, "xformers")
    return (backend.removesuffix(", route"),) if backend in OVER_FAKES else ()


def _run(backend: str, family: str, scenario: str) -> Cell:
    asked = SCENARIOS[scenario]
    key = (backend, family, scenario)
    torch._dynamo.reset()  # what an earlier cell compiled is not part of this one
    if FAMILIES[family].kind == "refused":
        return _refused(Case(FAMILIES[family], backend), key)
    try:
        case, expected, candidate = _asked(family, scenario)
    except Exception as failure:
        return Cell(*key, "wrong", detail=f"EAGER {type(failure).__name__}: {failure}"[:500])
    case.backend = backend
    torch.manual_seed(0)
    try:
        found = candidate()
    except AxattnError as refusal:
        return Cell(*key, "refused", detail=_why(refusal))
    except torch._dynamo.exc.Unsupported as failure:  # under fullgraph dynamo hides the error that it met
        return _uncompiled(key, candidate, failure)
    except Exception as failure:
        if str(failure).startswith("axattn: "):  # asserted when the compiled graph runs
            return Cell(*key, "refused", detail=str(failure).removeprefix("axattn: "))
        if (scenario, str(failure)) in UPSTREAM:
            return Cell(*key, "refused", detail=f"Transformers raises: {failure}")
        return Cell(*key, "wrong", detail=f"{type(failure).__name__}: {failure}"[:500])
    value, where = error(found, expected)
    if value <= asked.tolerance:
        return Cell(*key, "ok", value)
    return Cell(*key, "wrong", value, f"{where}: relative error {value:.2g}")


@functools.cache
def _asked(family: str, scenario: str) -> tuple[Case, Result, Callable[[], Result]]:
    """A case, what is right in it, and what runs the candidate on the case's backend: one reference for all of them."""
    torch.manual_seed(0)
    case = Case(FAMILIES[family], "")
    return case, *SCENARIOS[scenario].run(case)


def _uncompiled(key: tuple[str, str, str], candidate: Any, failure: Exception) -> Cell:
    """A refusal inside a traced graph, seen by running the same without the graph."""
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        try:
            candidate()
        except AxattnError as refusal:
            return Cell(*key, "refused", detail=_why(refusal))
    return Cell(*key, "wrong", detail=f"{type(failure).__name__}: {failure}"[:500])


def _why(refusal: AxattnError) -> str:
    """The distinct reasons of a refusal."""
    return "; ".join(dict.fromkeys(reason.text for reason in refusal.reasons)) or str(refusal)


def _refused(case: Case, key: tuple[str, str, str]) -> Cell:
    """Families with attention code of their own: served by Transformers alone, refused for every other name."""
    ids = torch.arange(3, 15)[None]
    try:
        model = case.candidate()
    except AxattnError as refusal:
        return Cell(*key, "refused", detail=_why(refusal))
    with torch.no_grad():
        value, where = error({"logits": model(ids)[0][0]}, {"logits": case.family.make()(ids)[0][0]})
    return Cell(*key, "ok" if value <= 1e-5 else "wrong", value, where)
