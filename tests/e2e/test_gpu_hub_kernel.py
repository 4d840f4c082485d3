"""The hub kernel on a real GPU: ``pytest -m gpu tests/e2e/test_gpu_hub_kernel.py``. Not yet run on one.

``AXATTN_GPU_TESTS_ON=cpu`` runs the same tests in Triton's interpreter, to check the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.integrations import hub_kernels

from hub_kernel.make import make
from tests.kernels.test_hub_kernel import ends, exact, load, made, relative
from tests.models import alone, build, positions, tokens

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("AXATTN_GPU_TESTS_ON", "cuda")
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bfloat16
LENGTHS = (70, 1, 130, 33)
OUTPUT, GRADIENT = 0.02, 0.03


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = make(tmp_path_factory.mktemp("hub-kernel"))
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield load(folder / "build" / f"torch-{DEVICE}")


@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 40), (False, None), (False, 40)])
def test_output_and_gradients(kernel: Any, dim: int, causal: bool, window: int | None) -> None:
    true = [x.detach().to(DEVICE).requires_grad_() for x in made(*LENGTHS, dim=dim)]
    given = [x.detach().to(DTYPE).requires_grad_() for x in true]
    cu = ends(*LENGTHS).to(DEVICE)
    sides = (-1, -1) if window is None else (window - 1, window - 1)
    out = kernel.flash_attn_varlen_func(*given, cu, cu, max(LENGTHS), max(LENGTHS), causal=causal, window_size=sides)
    wanted = exact(*true, LENGTHS, causal, window)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert 0 < relative(out.float(), wanted) < OUTPUT
    found = torch.autograd.grad((out.float() * weight).sum(), given)
    truth = torch.autograd.grad((wanted * weight).sum(), true)
    assert all(0 < relative(a.float(), b) < GRADIENT for a, b in zip(found, truth, strict=True))


def test_single_queries_are_exact(kernel: Any) -> None:
    q, k, v = (x.detach().to(DEVICE, DTYPE).unflatten(0, (3, 50)) for x in made(150, dim=64))
    out = kernel.flash_attn_func(q[:, -1:], k, v, causal=True)
    wanted = exact(*(x.float().flatten(0, 1) for x in (q, k, v)), (50, 50, 50), True, None).unflatten(0, (3, 50))
    assert relative(out.float(), wanted[:, -1:]) < 5e-3


def test_a_packed_step_in_transformers(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: kernel)
    ids, lengths, models = tokens(1, 60).to(DEVICE), (20, 29, 11), []
    for dtype in (DTYPE, torch.float32):
        model = build("llama", hidden_size=256, head_dim=64)
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.data.div_(16)  # attention spreads over several keys
        models.append(model.to(DEVICE, dtype).train())
    found, reference = models
    found.set_attn_implementation("axattn/int8-flash-attn", allow_all_kernels=True)
    wanted = alone(reference, ids, lengths)
    logits = found(ids, position_ids=positions(lengths).to(DEVICE), use_cache=False).logits.float()
    assert 0 < relative(logits, wanted) < 0.15
    for each in (logits, wanted):
        torch.nn.functional.cross_entropy(each[0], ids[0]).backward()
    for name in ("q_proj", "k_proj", "v_proj"):
        got, truth = (getattr(m.model.layers[0].self_attn, name).weight.grad.float() for m in models)
        assert relative(got, truth) < 0.3, name
