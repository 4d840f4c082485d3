"""What torch's ``scaled_dot_product_attention`` does on a real GPU, and axattn's calls of it: ``pytest -m gpu``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from axattn.backends import sdpa
from axattn.hf import torch_sdpa
from axattn.hf.torch_sdpa import sm

pytestmark = pytest.mark.gpu
attention: Any = sdpa.attention
takes: Any = torch_sdpa.takes_grouped_heads
stock: Any = F.scaled_dot_product_attention


def negative(queries: int, keys: int) -> list[torch.Tensor]:
    """q, k and v of which every logit is near -120 (after pytorch#196678): a logsumexp below -88.7."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16) * 0.1 for n in (queries, keys, keys))
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
    return [x.requires_grad_() for x in (q, k, v)]


CASES = {"masked": (704, 704, True), "bidirectional": (704, 704, False), "single": (1, 128, False)}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_finite_where_logits_are_very_negative(case: str) -> None:
    queries, keys, masked = CASES[case]
    inputs = negative(queries, keys)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device="cuda") if masked else None
    out = attention(*inputs, mask, 0.0, False, None)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.float().sum(), inputs))


def test_cudnn_still_has_to_be_kept_away() -> None:
    """Fails when it is fixed: `avoids_cudnn` can then name the version."""
    if sm(torch.device("cuda")) != 90:
        pytest.skip("cuDNN's fault is of its kernel for Hopper")
    inputs = negative(704, 704)
    mask = torch.ones(1, 1, 704, 704, dtype=torch.bool, device="cuda")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = stock(*inputs, mask)
        gradient = torch.autograd.grad(out.float().sum(), inputs)[0]
    cudnn: Any = torch.backends.cudnn
    assert not torch.isfinite(gradient).all(), f"cuDNN {cudnn.version()} gives finite gradients"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [64, 256, 512])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_never_run_on_the_math_kernel(dtype: torch.dtype, D: int, masked: bool) -> None:
    given = [torch.randn(1, n, 256, D, device="cuda", dtype=dtype) for n in (8, 2, 2)]
    mask = torch.ones(1, 1, 256, 256, dtype=torch.bool, device="cuda").tril() if masked else None
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused):  # raises where none of them takes the call
        found = attention(*given, mask, 0.0, not masked, None)
    wide = [given[0], *(x.repeat_interleave(4, 1) for x in given[1:])]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = stock(*(x.double() for x in wide), is_causal=True)
    assert ((found - wanted).norm() / wanted.norm()).item() < (1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_the_answer_in_a_graph_is_what_torch_takes() -> None:
    """In a graph torch can't be asked: the rule for FlashAttention 2 stands in for it."""
    for dtype in (torch.bfloat16, torch.float32):
        for D in (64, 256, 512):
            given = [torch.randn(1, n, 64, D, device="cuda", dtype=dtype) for n in (8, 2, 2)]
            answers: list[bool] = []

            def look(*given: torch.Tensor, answers: list[bool] = answers) -> torch.Tensor:
                answers.append(takes(*given, None, 0.0, True))
                return given[0] + 1

            torch.compile(look, backend="eager")(*given)
            assert not answers[0] or takes(*given, None, 0.0, True)
