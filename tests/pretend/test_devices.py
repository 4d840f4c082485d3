"""The pretence itself: what a GPU would refuse is refused, and what it computes is right."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from axattn.backends.base import on_gpu_of
from tests.fakes import flash
from tests.pretend.machine import two_gpus
from tests.pretend.tensors import PretendTensor, State, kernel


@pytest.fixture(autouse=True)
def gpus() -> Iterator[None]:
    with two_gpus():
        yield


def test_tensors_of_two_devices_do_not_mix() -> None:
    first, second, here = torch.ones(4, device="cuda"), torch.ones(4, device="cuda:1"), torch.ones(4)
    for a, b in ((first, second), (first, here), (here, second)):
        with pytest.raises(RuntimeError, match="same device"):
            a + b
    assert (first + second.to(0)).tolist() == [2, 2, 2, 2]
    assert (first + torch.tensor(1.0)).device == torch.device("cuda:0")  # a number may come from anywhere
    with pytest.raises(TypeError, match="numpy"):
        first.numpy()


def test_an_index_may_lie_on_the_cpu_and_a_selection_may_not() -> None:
    x = torch.arange(4, device="cuda:1")
    assert x[torch.tensor([1, 3])].tolist() == [1, 3]
    with pytest.raises(RuntimeError, match="same device"):
        x.index_select(0, torch.tensor([1, 3]))


def test_views_share_their_numbers() -> None:
    x = torch.zeros(4, device="cuda")
    x[1:3] += 2
    x.view(2, 2)[1, 1] = 5
    assert x.tolist() == [0, 2, 2, 5]


def test_backward_runs_in_a_thread_of_the_device() -> None:
    seen: list[Any] = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.extend((threading.current_thread(), torch.cuda.current_device()))
            return grad * 2

    x = torch.ones(3, device="cuda:1", requires_grad=True)
    Doubled.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.device == x.device
    assert x.grad.tolist() == [2, 2, 2]
    assert seen[0] is not threading.current_thread()
    assert seen[1] == 1
    assert torch.cuda.current_device() == 0


def test_a_kernel_launches_where_the_current_device_is() -> None:
    launch, library = kernel(torch.neg), kernel(torch.neg, sets_device=True)
    there = torch.ones(2, device="cuda:1")
    with pytest.raises(RuntimeError, match=r"launches on cuda:0, and its tensors are on cuda:1"):
        launch(there)
    assert library(there).tolist() == [-1, -1]
    with torch.cuda.device("cuda:1"):
        assert launch(there).tolist() == [-1, -1]
        with pytest.raises(RuntimeError, match="launches on cuda:1"):
            launch(there.to(0))
    assert launch(there.to(0)).tolist() == [-1, -1]


def test_only_another_gpu_is_made_the_current_one() -> None:
    here, there = torch.ones(1, device="cuda:0"), torch.ones(1, device="cuda:1")
    with on_gpu_of(there):
        assert torch.cuda.current_device() == 1
        with on_gpu_of(here):
            assert torch.cuda.current_device() == 0
        with on_gpu_of(torch.ones(1)):
            assert torch.cuda.current_device() == 1
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
    assert on_gpu_of(here) is on_gpu_of(torch.ones(1))


def test_a_module_moves_with_its_ties() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.to("cuda:1")
    assert isinstance(model[0].weight, PretendTensor)
    assert model[0].weight is model[1].weight
    model(torch.ones(1, 3, device="cuda:1")).sum().backward()
    assert model[0].weight.grad.device == torch.device("cuda:1")


def test_waiting_for_the_gpu_is_counted() -> None:
    x = torch.arange(4, device="cuda")
    State.waits.clear()
    _ = x + 1
    assert not State.waits
    assert x.sum().item() == 6
    assert x.nonzero().shape == (3, 1)
    assert x.cpu().tolist() == [0, 1, 2, 3]
    assert sum(State.waits.values()) == 3
    State.copies.clear()
    here = torch.ones(3)
    here.to("cuda")
    x.copy_(torch.arange(4))
    assert (sum(State.waits.values()), sum(State.copies.values())) == (5, 2)
    here.pin_memory().to("cuda", non_blocking=True)
    assert (sum(State.waits.values()), sum(State.copies.values())) == (5, 3)
    assert torch.tensor([1, 2], device="cuda").tolist() == [1, 2]
    assert sum(State.waits.values()) == 7


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (2, 2)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_stand_in_of_torchs_flash_kernel_is_exact(window: tuple[int, int], heads: int) -> None:
    from torch.nn.attention.varlen import varlen_attn

    torch.manual_seed(0)
    here = [torch.randn(11, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, heads, heads)]
    there = [x.detach().float().cuda().requires_grad_() for x in here]
    edges, expected = [0, 4, 11], []
    for a, b in pairwise(edges):
        q, k, v = (x[a:b].transpose(0, 1) for x in here)
        at = torch.arange(b - a)
        far = at[:, None] - at
        seen = torch.ones_like(far, dtype=torch.bool)
        seen = seen if window[0] < 0 else seen & (far <= window[0])
        seen = seen if window[1] < 0 else seen & (-far <= window[1])
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        expected.append(out.transpose(0, 1))
    lengths = torch.tensor(edges, dtype=torch.int32, device="cuda")
    grouped: dict[str, Any] = {"enable_gqa": True} if heads != 4 else {}
    with flash.sharp():
        found = varlen_attn(*there, lengths, lengths, 7, 7, window_size=window, **grouped)
        target = torch.randn(11, 4, 8)
        gradients = torch.autograd.grad((found * target.cuda()).sum(), there)  # type: ignore[operator]
    expected_gradients = torch.autograd.grad((torch.cat(expected) * target).sum(), here)
    for a, b in zip((found, *gradients), (torch.cat(expected), *expected_gradients), strict=True):
        assert torch.allclose(a.cpu().double(), b, atol=1e-5)  # type: ignore[union-attr]
