"""A kernel's forward and backward apart, inside the operators of compiled graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from typing import Any

import pytest
import torch

import axattn
from axattn import backends
from axattn.backends import fp8, sage
from axattn.backends.compiled_ops.varlen_op import attention_op
from axattn.backends.varlen_engine import forward_backward
from axattn.backends.varlen_engine.flash_backward import exact_forward
from tests.fakes.machine import hopper
from tests.models import build, positions, tokens
from tests.operators import RULES, documents, inputs, padding, rule
from tests.sampling import part_of

PASSES = {"tiles": forward_backward.TILES, "packed": forward_backward.PACKED, "none, so run again": None}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()  # the graphs of other tests count towards torch's limit


def with_passes(monkeypatch: pytest.MonkeyPatch, chosen: forward_backward.ForwardBackward | None) -> None:
    """`varlen` with those passes: the ones of a GPU run on a CPU too."""
    kernel = dataclasses.replace(backends.get("varlen"), forward_backward=lambda call: chosen)
    monkeypatch.setattr(backends, "get", lambda name: {"varlen": kernel}[name])


@pytest.mark.parametrize(("causal", "window", "chunk"), RULES)
@pytest.mark.parametrize("described", ["documents", "padding", "both", "holes", "documents and holes", "nothing"])
@pytest.mark.parametrize("passed", PASSES)
def test_the_operator_and_its_gradient_equal_dense_attention(
    causal: bool, window: int | None, chunk: int | None, described: str, passed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_passes(monkeypatch, PASSES[passed])
    ids = documents() if "documents" in described or described == "both" else None
    real = padding("holes" in described) if described not in ("documents", "nothing") else None
    q, k, v = inputs()
    out, _ = attention_op(q, k, v, ids, real, causal, window, chunk, 0.3, None, "varlen", "{}")
    mask = rule(ids, real, causal, window, chunk)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    seen = torch.ones(2, 12, dtype=torch.bool) if real is None else real
    assert torch.allclose(out[seen], expected.transpose(1, 2)[seen], atol=1e-5)
    target = torch.randn(out.shape) * seen[..., None, None]
    gradients = torch.autograd.grad(out, (q, k, v), target)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), target.transpose(1, 2))
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("passed", PASSES)
@pytest.mark.parametrize("value_dim", [3, 12])
@pytest.mark.parametrize("described", ["documents", "padding"])
def test_values_of_another_head_dim_in_the_operator(
    passed: str, value_dim: int, described: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_passes(monkeypatch, PASSES[passed])
    q, k, _ = inputs()
    v = torch.randn(2, 2, 12, value_dim, requires_grad=True)
    ids, real = (documents(), None) if described == "documents" else (None, padding(False))
    out, _ = attention_op(q, k, v, ids, real, True, None, None, 0.3, None, "varlen", "{}")
    mask, seen = rule(ids, real, True, None, None), torch.ones(2, 12, dtype=torch.bool) if real is None else real
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    assert out.shape == (2, 12, 4, value_dim)
    target = torch.randn(out.shape) * seen[..., None, None]
    gradients = torch.autograd.grad(out, (q, k, v), target)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), target.transpose(1, 2))
    for a, b in zip((out[seen], *gradients), (expected.transpose(1, 2)[seen], *expected_gradients), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_operator_says_of_its_outputs_is_so_in_every_dtype(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs())
    rest = (documents(), None, True, None, None, 0.3, None, "varlen", "{}")
    torch.library.opcheck(attention_op, (q, k, v, *rest), test_utils=("test_schema", "test_faketensor"))
    out, logsumexp = attention_op(q, k, v, *rest)
    assert out.dtype is dtype
    assert logsumexp.dtype is (dtype if dtype is torch.float64 else torch.float32)
    assert not logsumexp.requires_grad


def test_a_query_that_is_not_finite_shows_in_the_operators_output() -> None:
    q, k, v = inputs()
    with torch.no_grad():
        q[1, 2, 5, 3] = float("nan")
    out, _ = attention_op(q, k, v, documents(), None, True, None, None, 0.3, None, "varlen", "{}")
    assert torch.equal(out.isnan().any(-1).nonzero(), torch.tensor([[1, 5, 2]]))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        (
            "varlen",
            (
                "axattn.backends.varlen_engine.cpu_tiles.forward_over_tiles",
                "axattn.backends.varlen_engine.forward_backward.forward_over_tiles",
            ),
        ),
        ("sage", ("axattn.backends.int8_operator.attention",)),
        ("fp8", ("axattn.backends.fp8._attention",)),
    ],
)
@pytest.mark.parametrize("what", part_of(["model", "layers"], kept=["layers"]))
def test_a_compiled_step_runs_each_forward_once(
    name: str, where: tuple[str, ...], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def counted(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        if name != "varlen":
            stack.enter_context(hopper(name))
        model = axattn.apply(build("llama").train(), name)
        for path in where:
            module, _, function = path.rpartition(".")
            monkeypatch.setattr(path, counted(getattr(importlib.import_module(module), function)))
        runs: Any = model
        if what == "model":
            runs = torch.compile(model, backend="aot_eager")
        else:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        runs(tokens(1, 21), position_ids=positions((7, 11, 3)), use_cache=False).logits.square().sum().backward()
        assert {layer.compiled for layer in axattn.status(model).layers} == {name}
    assert calls == len(model.model.layers)


def test_an_exact_backward_uses_nothing_of_a_lossy_forward_but_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def useless(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])

    kernel = forward_backward.PackedForwardBackward(useless, lambda key, _: key, exact_forward)
    with_passes(monkeypatch, forward_backward.over_packed(kernel))
    q, k, v = inputs()
    out, _ = attention_op(q, k, v, documents(), None, True, None, None, 0.3, None, "varlen", "{}")
    mask = rule(documents(), None, True, None, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    target = torch.randn(out.shape)
    gradients = torch.autograd.grad(out, (q, k, v), target)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), target.transpose(1, 2))
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "backward"),
    part_of(
        [("sage", "flash"), ("sage", "exact"), ("fp8", "flash"), ("fp8", "exact")],
        kept=[("sage", "exact")],
    ),
)
def test_the_choice_of_backward_holds_in_a_compiled_step(
    name: str, backward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = 0

    def counted(*args: Any) -> Any:
        nonlocal again
        again += 1
        return exact_forward(*args)

    for module in (sage, fp8):
        monkeypatch.setattr(module, "exact_forward", counted)
    monkeypatch.setattr(sage, "_FORWARD_BACKWARD_EXACT", sage._FORWARD_BACKWARD._replace(recompute=counted))
    with hopper(name):
        model = axattn.apply(build("llama", num_hidden_layers=1).train(), name, kernel_options={"backward": backward})
        compiled = torch.compile(model, backend="aot_eager")
        compiled(tokens(1, 21), position_ids=positions((7, 14)), use_cache=False).logits.sum().backward()
    assert again == (len(model.model.layers) if backward == "exact" else 0)
