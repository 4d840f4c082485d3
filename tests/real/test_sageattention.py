"""axattn's adapter over the real sageattention library, its kernels in Triton's interpreter: seconds a case.

Two cases run in `make test`; ``AXATTN_REAL=all``, as in `make nightly`, runs the others. The library asserts that its
tensors lie on a GPU, which is all that is patched here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from axattn.backends import get, sage
from axattn.backends.call import AttentionCall
from axattn.documents.boundaries import Segments
from axattn.masks.mask_interface import lazy_mask
from tests.fakes import sageattention as fake
from tests.interpreter import INTERPRETED

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("sageattention") is None,
        reason="sageattention is not installed: pip install --no-deps sageattention==1.0.6",
    ),
    pytest.mark.skipif(
        not INTERPRETED, reason="Triton's interpreter is off (no triton from 3.7 on, or a GPU is there)"
    ),
]
nightly = pytest.mark.skipif(os.environ.get("AXATTN_REAL") != "all", reason="seconds a case; AXATTN_REAL=all runs it")
SCALE = 0.11


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library itself, made for the interpreter, which takes tensors of the CPU."""
    sage.sage_module.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined
        module = importlib.import_module("sageattention")
    assert module is not fake
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # the number of a CPU's tensors
    yield module
    sage.sage_module.cache_clear()


def qkv(
    rows: int, length: int, dim: int = 64, kv_heads: int = 1, dtype: torch.dtype = torch.float16
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(rows, heads, length, dim) for heads in (2, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
    return [query, key + 20, value]  # keys far from zero: rounded as they are, they would lose what distinguishes them


def run(inputs: list[torch.Tensor], mask: Any) -> torch.Tensor:
    call = AttentionCall(torch.nn.Identity(), *inputs, mask, True, None, SCALE, 0.0, None, None, None, {})
    forward = get("sage:library").forward
    assert forward is not None
    return forward(call)


def exact(inputs: list[torch.Tensor], row: int, a: int, b: int) -> torch.Tensor:
    """The tokens `a` to `b` of a row as a document alone, in float32."""
    q, k, v = (x[row : row + 1, :, a:b].float() for x in inputs)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)[0]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


CASES = [
    # rows, documents of a row, head dim, KV heads, dtype
    pytest.param(1, (0, 70, 75, 210), 64, 1, torch.float16, id="documents"),
    pytest.param(2, (0, 100), 64, 1, torch.float16, id="whole rows"),
    pytest.param(1, (0, 70, 75, 210), 64, 1, torch.bfloat16, id="documents in bf16", marks=nightly),
    pytest.param(1, (0, 1, 129, 140), 128, 1, torch.float16, id="head dim 128", marks=nightly),
    pytest.param(2, (0, 130), 128, 2, torch.float16, id="whole rows of head dim 128", marks=nightly),
    pytest.param(1, (0, 64, 192), 64, 2, torch.float16, id="documents of whole blocks", marks=nightly),
]


@pytest.mark.parametrize(("rows", "edges", "dim", "kv_heads", "dtype"), CASES)
def test_documents_equal_each_alone_and_the_keys_stay(
    library: Any, rows: int, edges: tuple[int, ...], dim: int, kv_heads: int, dtype: torch.dtype
) -> None:
    inputs = qkv(rows, edges[-1], dim, kv_heads, dtype)
    before = [x.clone() for x in inputs]
    mask = lazy_mask(rows, edges[-1], edges[-1])
    if len(edges) > 2:
        mask = mask.with_segments(Segments((edges,) * rows, torch.device("cpu")))
    out = run(inputs, mask)
    assert out.dtype == dtype
    for row in range(rows):
        for a, b in pairwise(edges):
            assert error(out[row, a:b], exact(inputs, row, a, b)) < 0.015, (row, a, b)
    assert all(map(torch.equal, inputs, before))


@nightly
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_each_alone(library: Any, side: str) -> None:
    inputs, padding = qkv(2, 100), torch.ones(2, 100, dtype=torch.bool)
    a, b = (30, 100) if side == "left" else (0, 70)
    padding[1] = False
    padding[1, a:b] = True
    out = run(inputs, lazy_mask(2, 100, 100, attention_mask=padding))
    assert error(out[0], exact(inputs, 0, 0, 100)) < 0.015
    assert error(out[1, a:b], exact(inputs, 1, a, b)) < 0.015


@nightly
def test_a_gradient_reaches_all_three(library: Any) -> None:
    q, k, v = qkv(1, 70)
    inputs = [x.detach().requires_grad_() for x in (q, k - 18, v)]  # in 16 bit dq loses what is far from zero
    out = run(inputs, lazy_mask(1, 70, 70))
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((exact(inputs, 0, 0, 70) * weight[0].float()).sum(), inputs)
    assert all(error(a, b.float()) < 0.02 for a, b in zip(found, wanted, strict=True))


@nightly
def test_what_the_record_leaves_out_the_library_gets_wrong(library: Any) -> None:
    """Why `axattn.backends.sage.LIBRARY` is what it is, and the fake raises there; it shows when that is fixed."""
    q, k, v = qkv(1, 100, kv_heads=2)
    k = k - 20
    wanted = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=SCALE)
    assert error(library.sageattn(q, k.clone(), v, is_causal=False, sm_scale=SCALE), wanted) > 0.05  # padded keys
    edges = torch.tensor([0, 100], dtype=torch.int32), torch.tensor([0, 40], dtype=torch.int32)
    few = q[:, :, 60:]
    packed = [x[0].transpose(0, 1).contiguous() for x in (few, k, v)]
    found = library.sageattn_varlen(
        *packed, edges[1], edges[0], 40, 100, is_causal=True, sm_scale=SCALE, smooth_k=False
    )
    whole = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, scale=SCALE
    )
    assert error(found.transpose(0, 1), whole[0, :, 60:]) > 0.05  # aligned top-left
    keys = k.clone()
    library.sageattn(q, keys, v, is_causal=True)
    assert not torch.equal(keys, k)  # it smooths them in place


@pytest.mark.parametrize("name", ["sageattn", "sageattn_varlen"])
def test_the_fake_has_the_signatures_of_the_library(library: Any, name: str) -> None:
    def parameters(module: Any) -> list[Any]:
        found = inspect.signature(getattr(module, name)).parameters.values()
        return [(p.kind, None if p.kind is p.VAR_KEYWORD else (p.name, p.default)) for p in found]

    assert parameters(fake) == parameters(library)
