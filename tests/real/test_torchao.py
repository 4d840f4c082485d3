"""torchao's own fp8 quantiser, its kernels in Triton's interpreter, under axattn's adapter and against its fake.

What is patched: the number of processors, which it asks a GPU; its tuning, which times launches there; and the
interpreter's cast to fp8, which truncates where a chip rounds and saturates.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from axattn.backends import fp8
from axattn.hf import integrations
from axattn.kernels.document_statistics import Documents
from axattn.masks.varlen_layout import Layout, Span
from tests.fakes import torchao as fake
from tests.interpreter import INTERPRETED
from tests.real.loading import on_cpu
from tests.real.packages import EVERYTHING, folder, is_there, needs

VERSIONS = ("torchao", "torchao-0.17") if EVERYTHING else ("torchao",)
pytestmark = [
    needs("torchao"),
    pytest.mark.skipif(
        not INTERPRETED, reason="Triton's interpreter is off (no triton from 3.7 on, or a GPU is there)"
    ),
]
nightly = pytest.mark.skipif(not EVERYTHING, reason="seconds a case; AXATTN_REAL=all runs it")
PLACE = "torchao.prototype.attention.quantization"
SHAPES = [(2, 4, 2, 70, 16, torch.bfloat16)]
if EVERYTHING:
    SHAPES += [
        (1, 6, 1, 33, 128, torch.float16),
        (3, 2, 2, 5, 64, torch.bfloat16),
        (1, 2, 1, 200, 80, torch.bfloat16),
        (2, 8, 2, 1, 256, torch.bfloat16),
        (1, 1, 1, 31, 24, torch.float32),
    ]


@functools.cache
def load(version: str) -> Any:
    """The package of the quantisers, without what torchao's other packages import."""
    outside = {}
    path = folder(version)
    for part in PLACE.split(".")[:-1]:
        path = path / part
        name = ".".join(path.relative_to(folder(version)).parts)
        outside[name] = ModuleType(name)
        outside[name].__path__ = [str(path)]
    with on_cpu(version, stand_ins=outside), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined
        package = importlib.import_module(PLACE)
        kernels = sys.modules[PLACE + ".triton_qkv_quantization"]
    for tuned in (kernels.single_phase1_kernel, kernels.single_phase2_kernel):
        tuned.configs = tuned.configs[:1]
    return package, kernels


def _rounding(real: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's cast with that of Hopper for e4m3: ``cvt.rn.satfinite.e4m3x2.f32`` (PTX ISA)."""

    def cast(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) != ("fp32", "fp8e4nv"):
            return real(data, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    return cast


@pytest.fixture(params=VERSIONS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What axattn's adapter takes from torchao, on a card with few processors: a row is three chunks."""
    from triton.runtime import interpreter

    if not is_there(request.param):
        pytest.skip(f"{request.param} is not in build/real: `make real-kernels`")
    package, kernels = load(request.param)
    monkeypatch.setattr(kernels, "_compute_num_chunks", lambda *_: 3)
    monkeypatch.setattr(interpreter, "_convert_float", _rounding(interpreter._convert_float))
    monkeypatch.setitem(sys.modules, PLACE, package)
    quantiser = integrations.fp8_quantiser()
    assert quantiser is kernels.triton_fp8_sdpa_quantize
    return quantiser


def made(rows: int, heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """``[B, H, S, D]`` three times, each row and head of its own size, as views of ``[B, S, H, D]``."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for h in (heads, kv_heads, kv_heads):
        sizes = torch.rand(rows, 1, h, 1, generator=generator).mul(9).exp() / 100
        found.append((torch.randn(rows, length, h, dim, generator=generator) * sizes).to(dtype).transpose(1, 2))
    return found


def require_same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fake_gives_its_bits(library: Any, shape: Any) -> None:
    inputs = made(*shape)
    assert shape is not SHAPES[0] or not any(x.is_contiguous() for x in inputs)  # heads first: it makes copies
    kept = [x.clone() for x in inputs]
    found = library(*inputs)
    require_same(found, fake.fp8_sdpa_quantize(*inputs))
    require_same(found, library(*(x.contiguous() for x in inputs)))
    require_same(inputs, kept)


def test_rows_come_out_of_the_adapter_as_documents_do_of_axattns_kernel(library: Any) -> None:
    from axattn.kernels import fp8_quantiser

    rows, _, kv_heads, length, *_ = SHAPES[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in made(*SHAPES[0]))
    span = Span(0, rows, 0, length, 0, length)
    found = fp8.quantised_rows(q, k, v, Layout((span,), True, None, rows, length, length))
    expected = [fp8_quantiser.quantise(x, Documents((length,) * rows, x.device), kv_heads) for x in (q, k, v)]
    require_same(found, [*(x.values for x in expected), *(x.undo for x in expected)])


@nightly
@pytest.mark.parametrize("value", [0.0, 1e-38, float("nan"), float("inf")])
def test_values_that_are_extreme_or_not_finite(library: Any, value: float) -> None:
    inputs = made(1, 2, 1, 9, 16, torch.bfloat16)
    for x in inputs:
        if value < 1:
            x.zero_()
        x[0, 0, 4, 3] = value
    q, k, v, *undo = library(*inputs)
    for x, scale in zip((q, k, v), undo, strict=True):
        back = x.float() * scale[..., None, None]
        assert back[0, 0, 4, 3].isfinite() == (value < 1)
        assert (back[0, 0, 4, 3] == 0) == (value < 1)
        assert value == float("inf") or back[0, 0, :4].isfinite().all()


WRONG: dict[str, Callable[[list[torch.Tensor]], list[torch.Tensor]]] = {
    "no rows": lambda x: [x[0][0], *x[1:]],
    "keys unlike values": lambda x: [x[0], x[1][:, :, :3], x[2]],
    "other rows": lambda x: [x[0][:1], *x[1:]],
    "other head dims": lambda x: [x[0][..., :8], *x[1:]],
    "heads in no groups": lambda x: [x[0][:, :3], *x[1:]],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_fake_refuses_what_it_refuses(library: Any, wrong: str) -> None:
    inputs = WRONG[wrong](made(2, 4, 2, 5, 16, torch.bfloat16))
    for function in (library, fake.fp8_sdpa_quantize):
        with pytest.raises((AssertionError, ValueError)):
            function(*inputs)


def test_the_fake_has_its_signature(library: Any) -> None:
    real, faked = (inspect.signature(f).parameters for f in (library, fake.fp8_sdpa_quantize))
    assert list(real)[: len(faked)] == list(faked)
    assert all(p.default is not p.empty for p in list(real.values())[len(faked) :])


@nightly
@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_where_the_adapter_imports_it_from(version: str) -> None:
    if not is_there(version):
        pytest.skip(f"{version} is not in build/real: `make real-kernels`")
    code = (
        "from axattn.hf import library_contracts as c\n"
        "(found,) = [x for x in c.CONTRACTS if x.name == 'the fp8 quantiser']\n"
        "print(repr(found.check()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder(version)), os.getcwd()])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "''", done.stderr
