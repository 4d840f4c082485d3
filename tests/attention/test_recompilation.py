"""Compiled models and compiled layers: what eager gives, and a number of graphs that stops growing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import axattn
from axattn.attention import registry_functions
from tests.models import build, positions, tokens
from tests.parallel_jobs import compare, gradients, packed_batch
from tests.sampling import SAMPLE, part_of


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


class Counted:
    """A compiler that counts its graphs; with `backward`, it also traces their backward, which takes twice the time."""

    def __init__(self, backward: bool = False) -> None:
        self.graphs, self.backward = 0, backward

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, inputs) if self.backward else graph


def packed() -> Iterator[dict[str, Any]]:
    for seed, length in enumerate((24, 30, 41, 64)):
        yield packed_batch(seed, length)


def dense() -> Iterator[dict[str, Any]]:
    for length in (33, 47, 21, 64):
        yield {"input_ids": tokens(2, length), "labels": tokens(2, length)}


def padded() -> Iterator[dict[str, Any]]:
    for length in (13, 19, 26, 31):
        mask = torch.tensor([[1] * length, [1] * (length - 4) + [0] * 4])
        yield {"input_ids": tokens(2, length), "labels": tokens(2, length), "attention_mask": mask}


KINDS = {"packed": packed, "dense": dense, "padded": padded}
SIZES: dict[str, dict[str, Any]] = {"mistral": {"num_hidden_layers": 1}}
"""One kind of layers is one layer."""
_MODELS = (("mistral", "varlen"), ("gemma2", "auto"))


def step(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


@torch.no_grad()
def test_a_model_compiled_before_anything_ran_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_functions, "_imported", [])
    model = axattn.apply(build("mistral", **SIZES["mistral"]).eval(), "varlen")
    given = {"input_ids": tokens(1, 16), "position_ids": positions((6, 10))}
    counted = Counted()
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    found = [compiled(**given, use_cache=False).logits for _ in range(3)]
    assert counted.graphs == 1
    torch.testing.assert_close(model(**given, use_cache=False).logits, found[-1])


@pytest.mark.parametrize(
    ("family", "name", "kind", "what"),
    part_of(
        [(*model, kind, what) for model in _MODELS for kind in KINDS for what in ("model", "layers")],
        kept=[("mistral", "varlen", "packed", "model")],
    ),
)
def test_lengths_that_change_make_two_graphs_and_the_results_of_eager(
    family: str, name: str, kind: str, what: str
) -> None:
    reference, model = (axattn.apply(build(family, **SIZES.get(family, {})), name).train() for _ in range(2))
    counted, kinds_of_layers = Counted(backward=what == "model" and SAMPLE == "nightly"), 1
    runs: Any = model
    if what == "model":
        runs = torch.compile(model, backend=counted, fullgraph=True)
    else:
        for layer in model.model.layers:
            layer.compile(backend=counted, fullgraph=True)
        kinds_of_layers = len(set(getattr(model.config, "layer_types", None) or ["all"]))
    for batch in KINDS[kind]():
        loss, grads = step(reference, batch)
        mine, found = step(runs, batch)
        assert torch.allclose(mine, loss, rtol=1e-6)
        assert compare({k.removeprefix("_orig_mod."): v for k, v in found.items()}, grads) < 1e-5
    assert counted.graphs <= 2 * kinds_of_layers  # the first length, and all others


@pytest.mark.nightly
def test_s2_is_sparse_in_training_and_full_in_evaluation_inside_a_graph() -> None:
    reference, model = (
        axattn.apply(build("llama", num_hidden_layers=1), "s2", kernel_options={"group_size": 4}) for _ in range(2)
    )
    compiled = torch.compile(model, backend=Counted(), fullgraph=True)
    ids = tokens(2, 12)
    logits = []
    for training in (True, False):
        model.train(training)
        reference.train(training)
        expected = reference(ids, use_cache=False).logits
        assert torch.allclose(compiled(ids, use_cache=False).logits, expected, atol=1e-5)
        logits.append(expected)
    assert not torch.allclose(*logits, atol=1e-2)


def test_a_layer_compiled_by_itself_goes_back_through_its_checkpoint() -> None:
    reference, model = (axattn.apply(build("llama"), "varlen").train() for _ in range(2))
    for one in (reference, model):
        one.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.compile(backend=Counted(), fullgraph=False)
    batch = packed_batch(1)
    loss, grads = step(reference, batch)
    mine, found = step(model, batch)
    assert torch.allclose(mine, loss, rtol=1e-6)
    assert compare(found, grads) < 1e-5


@pytest.mark.parametrize(
    ("family", "kernel", "reentrant"),
    part_of(
        [
            (*one, way) for one in (("llama", "varlen"), ("gemma2", "eager")) for way in (False, True)
        ],  # one takes masks dense
        kept=[],
    ),
)
def test_a_model_compiles_whole_with_its_checkpoints(family: str, kernel: str, reentrant: bool) -> None:
    reference, model = (axattn.apply(build(family), "auto").train() for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = torch.compile(model, backend=Counted(), fullgraph=True)
    batch = packed_batch(1)
    loss, grads = step(reference, batch)
    mine, found = step(runs, batch)
    assert torch.allclose(mine, loss, rtol=1e-6)
    assert compare({k.removeprefix("_orig_mod."): v for k, v in found.items()}, grads) < 1e-5
    assert {layer.compiled for layer in axattn.status(model).layers} == {kernel}


def test_masks_of_compiled_layers_are_freed_with_their_batch() -> None:
    import gc
    import weakref

    from axattn.masks.lazy_mask import of_handle
    from axattn.masks.mask_interface import lazy_mask

    padding = torch.ones(2, 9, dtype=torch.bool)
    mask = lazy_mask(2, 9, 9, attention_mask=padding)
    assert mask.handle is not None
    assert of_handle(mask.handle) is of_handle(mask.handle)
    held = weakref.ref(padding)
    gc.disable()
    try:
        del mask, padding
        assert held() is None  # by counting references: no cycle waits for the collector
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "described"),
    part_of(
        itertools.product(("llama", "mistral", "gemma2", "llama4"), ("packed", "padded", "document ids", "dense")),
        kept=[("llama", "packed")],
    ),
)
def test_a_graph_broken_between_the_masks_and_the_layers(family: str, described: str) -> None:
    """The mask is made while a graph is traced, and read by layers that are not (checkpointing, hooks, printing)."""
    one = {"num_hidden_layers": 1} if family in ("llama", "mistral") else {}
    model = axattn.apply(build(family, **one), "auto")
    ids, lengths = tokens(1, 21), (7, 11, 3)
    given: dict[str, Any] = {"use_cache": False}
    if described == "packed":
        given["position_ids"] = positions(lengths)
    elif described == "document ids":
        given["attention_mask"] = torch.cat([torch.full((1, n), i + 1) for i, n in enumerate(lengths)], 1)
    elif described == "padded":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][:, 15:] = 0
    real = given.get("attention_mask", torch.ones_like(ids)).bool()
    expected = model(ids, **given).logits[real]
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    found = torch.compile(model, backend="eager")(ids, **given).logits[real]
    assert torch.allclose(found, expected, atol=1e-5)
