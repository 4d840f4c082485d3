"""How often a forward waits for the GPU, and how much it copies to it: as often with two layers as with more."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import axattn
from axattn import backends
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine.packed import packed_index
from axattn.hf.transfers import on_device
from axattn.masks.varlen_layout import Layout, Span
from axattn.planning import ranking
from tests.conformance.cases import packed, padded
from tests.fakes.machine import FLASH, hopper
from tests.models import build
from tests.pretend import matrix
from tests.pretend.machine import two_gpus
from tests.pretend.tensors import State
from tests.sampling import part_of

SPANS = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers", "fp8", "sage")
"""The kernels over spans; ``sage:library`` has head dims that tiny models lack (tests/backends/test_sage.py)."""
BATCHES = {
    "whole": packed((9,), (9,)),
    "packed": packed((7, 11, 3), (5, 9), pad=2),
    "left": padded(12, 7, 9, side="left"),
}
MOST = {"whole": 1, "packed": 2, "left": 2}
"""Waits of a forward and its backward. Without padding Transformers itself looks whether positions start anew: one.
axattn: where documents start; left padding: one read in the input hook, one for the mask."""


@pytest.fixture(autouse=True)
def gpus() -> Iterator[None]:
    with two_gpus(), matrix.kernels():
        yield


@pytest.fixture(params=SPANS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kernel that is installed, and what `auto` takes first: a flash name alone would be run by Transformers."""
    monkeypatch.setattr(ranking, "_HOPPER", (ranking.Rank(request.param, "under test"), *ranking._HOPPER))
    with hopper(request.param):
        yield request.param


def model_of(name: str, layers: int) -> Any:
    model = axattn.apply(build("llama", num_hidden_layers=layers), "auto" if name in FLASH else name)
    return model.to("cuda")


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    batch = BATCHES[kind]
    inputs = {"packed": {"position_ids": batch.positions}, "left": {"attention_mask": batch.mask}}.get(kind, {})
    return {key: x.to("cuda") for key, x in {"input_ids": batch.ids, **inputs}.items()}


def require_served(name: str, model: Any) -> None:
    assert {kernel for layer in axattn.status(model).layers for kernel in layer.served} <= {name, "varlen"}


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """Waits and copies of the second run."""
    run()
    State.waits.clear()
    State.copies.clear()
    run()
    return sum(State.waits.values()), sum(State.copies.values())


@pytest.mark.parametrize(
    ("name", "kind"),
    part_of(
        itertools.product(SPANS, BATCHES),
        kept=[
            *zip(SPANS, itertools.cycle(("packed", "left", "whole")), strict=False),
            ("varlen", "left"),
            ("varlen", "whole"),
        ],
    ),
    indirect=["name"],
)
def test_one_more_layer_neither_syncs_nor_copies(name: str, kind: str) -> None:
    given = inputs_of(kind)

    def counts(layers: int) -> tuple[int, int]:
        model = model_of(name, layers)

        def step() -> None:
            model(**given, use_cache=False).logits.sum().backward()

        found = counted(step)
        require_served(name, model)
        return found

    few, many = counts(2), counts(4)
    assert few == many
    assert few[0] <= MOST[kind], State.waits


@pytest.mark.parametrize("kind", BATCHES)
def test_one_more_layer_on_a_second_gpu_neither_syncs_nor_copies(kind: str) -> None:
    def counts(layers: int) -> tuple[int, int]:
        model = matrix.on_gpus(axattn.apply(build("llama", num_hidden_layers=layers), "varlen"), "two")
        given = inputs_of(kind)
        return counted(lambda: model(**given, use_cache=False))

    few, many = counts(2), counts(6)
    assert few == many
    assert few[0] <= 12


@torch.no_grad()
def test_a_step_of_decoding_under_padding_syncs_once(name: str) -> None:
    batch = BATCHES["left"]
    ids, mask = batch.ids.to("cuda"), batch.mask.to("cuda")
    rows = len(ids)

    def counts(layers: int) -> tuple[int, int]:
        model, now = model_of(name, layers), mask
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values

        def step() -> None:
            nonlocal now
            now = torch.cat([now, now.new_ones(rows, 1)], 1)
            model(ids[:, :1], attention_mask=now, past_key_values=cache)

        return counted(step)

    few, many = counts(2), counts(4)
    assert few == many
    assert few[0] <= 1


def test_what_a_cuda_graph_reads_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds addresses; a cache that forgets would free what it replays."""
    layout, device = Layout((Span(0, 2, 0, 9, 0, 9),), True, 4, 2, 9, 9), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert packed_index(layout, device) is not packed_index(layout, device)
    assert not layout.memo
    State.waits.clear()
    on_device(torch.arange(3), device)
    assert sum(State.waits.values()) > 0  # a copy that waits raises in a capture: nothing stale is replayed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert packed_index(layout, device) is packed_index(layout, device)


@pytest.mark.parametrize(
    ("queries", "causal", "window"), [(9, True, None), (9, False, None), (1, True, None), (9, True, 4)]
)
def test_calls_without_a_mask_neither_sync_nor_copy(name: str, queries: int, causal: bool, window: int | None) -> None:
    if name == "fp8" and window is not None:
        pytest.skip("fa3-fwd has no windows")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 16) for heads, length in ((4, queries), (2, 9), (2, 9)))
    here = [x.to("cuda") for x in (q, k, v)]
    backend = backends.get(name)
    assert backend.forward is not None

    def run() -> torch.Tensor:
        options: tuple[Any, ...] = (None, causal, window, 0.3, 0.0, None, None, None, {})
        assert backend.forward is not None
        return backend.forward(AttentionCall(torch.nn.Identity(), *here, *options))

    assert counted(run) == (0, 0)
    index = torch.arange(9)
    far = index[-queries:, None] - index
    seen = torch.ones_like(far, dtype=torch.bool) if not causal else (far >= 0) & (far < (window or 9))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    assert torch.allclose(run().cpu(), expected.transpose(1, 2), atol=1e-5)
