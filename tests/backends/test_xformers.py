"""xformers over a strict fake: the library's own biases and checks, a plain reference for its kernel."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import axattn
from axattn.backends import get
from axattn.backends.call import AttentionCall
from axattn.backends.xformers import bidirectional_window, block_diagonal
from axattn.masks.mask_interface import lazy_mask
from axattn.masks.varlen_layout import Layout, Span
from tests.environments import HOPPER, TURING, machine
from tests.fakes.machine import hopper
from tests.models import alone, build, positions, tokens

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None, reason="xformers has no wheel for this platform"
)


def inputs(grad: bool = False, dim: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, 6, d, requires_grad=grad) for h, d in ((4, 16), (2, 16), (2, dim))]


def run(q: Any, k: Any, v: Any, mask: Any, **options: Any) -> torch.Tensor:
    given = {"causal": True, "window": None, "scale": 0.3, "dropout": 0.0, "softcap": None, "sinks": None, "bias": None}
    call = AttentionCall(torch.nn.Identity(), q, k, v, mask, **{**given, **options}, extras={})
    forward = get("xformers").forward
    assert forward is not None
    return forward(call)


@pytest.mark.parametrize("dim", [16, 8])
def test_forward_and_gradients_with_grouped_heads(dim: int) -> None:
    q, k, v = inputs(True, dim)
    with hopper("xformers"):
        out = run(q, k, v, lazy_mask(2, 6, 6))
        with torch.no_grad():
            assert torch.allclose(run(q, k, v, lazy_mask(2, 6, 6)), out, atol=1e-6)  # the grouped form of inference
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)
    target = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), target)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), target.transpose(1, 2))
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_dropout_reaches_the_kernel() -> None:
    q, k, v = inputs()
    with hopper("xformers"):
        torch.manual_seed(0)
        assert not torch.equal(run(q, k, v, None, dropout=0.5), run(q, k, v, None, dropout=0.5))


def test_the_biases_mean_what_a_layout_means() -> None:
    spans = (Span(0, 1, 0, 3, 0, 3), Span(0, 1, 3, 5, 3, 8))  # the second has a cache of three keys
    q, k = torch.arange(5)[:, None], torch.arange(8)
    second = (q >= 3) & (k >= 3) & (k <= q + 3)
    causal = Layout(spans, True, None, 1, 5, 8)
    wanted = ((q < 3) & (k < 3) & (k <= q)) | second
    assert torch.equal(block_diagonal(causal, torch.device("cpu")).materialize((5, 8)) == 0, wanted)
    windowed = Layout(spans, True, 2, 1, 5, 8)
    wanted = ((q < 3) & (k < 3) & (k <= q) & (k > q - 2)) | (second & (k > q + 1))
    assert torch.equal(block_diagonal(windowed, torch.device("cpu")).materialize((5, 8)) == 0, wanted)
    full = Layout(spans, False, None, 1, 5, 8)
    wanted = ((q < 3) & (k < 3)) | ((q >= 3) & (k >= 3))
    assert torch.equal(block_diagonal(full, torch.device("cpu")).materialize((5, 8)) == 0, wanted)
    index = torch.arange(6)
    both = bidirectional_window(Layout((Span(0, 1, 0, 6, 0, 6),), False, 3, 1, 6, 6)).materialize((6, 6)) == 0
    assert torch.equal(both, (index[:, None] - index).abs() < 3)


def test_training_a_packed_model_through_xformers_equals_its_documents_alone() -> None:
    ids, lengths = tokens(1, 21), (7, 11, 3)
    reference = build("mistral").train()
    alone(reference, ids, lengths).square().sum().backward()
    with hopper("xformers"):
        model = axattn.apply(build("mistral").train(), "xformers")
        model(ids, position_ids=positions(lengths)).logits.square().sum().backward()
        assert {kernel for layer in axattn.status(model).layers for kernel in layer.served} == {"xformers"}
    for (name, wanted), (_, got) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(got.grad, wanted.grad, atol=1e-4 * wanted.grad.abs().max().item()), name


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        (machine("cuda", 90, xformers=None), "xformers is not installed"),
        (machine("cuda", 90, xformers="0.0.30"), "older than 0.0.35"),
        (machine("cuda", 90, cuda_runtime_12=None), "built for CUDA 12"),
        (machine("cuda", 90, flash_attn=None), "fails to import"),
        (machine(), "needs an NVIDIA GPU"),
    ],
)
def test_what_keeps_xformers_from_running_is_reported(environment: Any, part: str) -> None:
    assert any(part in reason.text for reason in get("xformers").probe(environment))


def test_where_xformers_runs() -> None:
    assert get("xformers").probe(HOPPER) == []
    assert get("xformers").probe(TURING) == []
