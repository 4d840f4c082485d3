"""Models on one GPU, with their layers over two in turn, and copied to both by ``nn.DataParallel``."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import axattn
from axattn.backends import sage
from axattn.machine.environment import Environment
from axattn.masks import lazy_mask
from tests.conformance.cases import Batch, packed, padded
from tests.environments import machine as environment
from tests.fakes import sageattention
from tests.fakes.machine import hopper
from tests.models import build
from tests.pretend import matrix
from tests.pretend.data_parallel import data_parallel
from tests.pretend.machine import two_gpus
from tests.pretend.tensors import State
from tests.sampling import part_of

BATCHES = {
    "packed": packed((7, 11, 3), (5, 9), (4, 4), (20,), pad=2),
    "right": padded(12, 7, 9, 5, side="right"),
    "left": padded(12, 7, 9, 5, side="left"),
}


@pytest.fixture(autouse=True)
def gpus() -> Iterator[None]:
    with two_gpus(), matrix.kernels():
        yield


def given(kind: str) -> dict[str, torch.Tensor]:
    batch = BATCHES[kind]
    return {"position_ids": batch.positions} if kind == "packed" else {"attention_mask": batch.mask}


def step(model: Any, batch: Batch, **inputs: Any) -> dict[str, torch.Tensor]:
    """Logits of the documents, and every gradient, on the CPU."""
    ids = inputs.pop("input_ids", batch.ids)
    out = model(ids, use_cache=False, **inputs).logits.cpu()
    real = torch.cat([out[row, a:b] for row, a, b in batch.documents])
    (real * torch.randn(real.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {"logits": real.detach(), **{n: p.grad.cpu() for n, p in model.named_parameters()}}


def alone(family: str, batch: Batch) -> dict[str, torch.Tensor]:
    model = build(family)
    parts = [model(batch.ids[row : row + 1, a:b], use_cache=False).logits[0] for row, a, b in batch.documents]
    real = torch.cat(parts)
    (real * torch.randn(real.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {"logits": real.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    floor = 1e-3 * max(x.norm().item() for name, x in expected.items() if name != "logits")
    for name, wanted in expected.items():
        got = found[name.removeprefix("module.")] if name in found else found[f"module.{name}"]
        assert ((got - wanted).norm() / (wanted.norm() + floor)).item() < 2e-5, name


@pytest.mark.parametrize(
    ("family", "kind", "place"),
    part_of(
        itertools.product(("llama", "gemma3", "gpt_oss"), ("right", "left"), matrix.PLACES),
        kept=[
            *(("llama", "right", "one"), ("llama", "left", "two")),
            *(("gemma3", "left", "one"), ("gemma3", "right", "two"), ("gpt_oss", "left", "two")),
        ],
    ),
)
def test_unpadded_batches(family: str, kind: str, place: str) -> None:
    model = matrix.on_gpus(axattn.apply(build(family), "auto", unpad=True), place)
    require_equal(step(model, BATCHES[kind], **given(kind)), alone(family, BATCHES[kind]))


@pytest.mark.parametrize(
    ("family", "place"),
    part_of(
        itertools.product(("qwen3_next", "bamba"), (*matrix.PLACES, "copies")),
        kept=[("qwen3_next", "one"), ("qwen3_next", "two"), ("bamba", "copies")],
    ),
)
def test_layers_that_run_document_by_document(family: str, place: str) -> None:
    model, batch = axattn.apply(build(family), "auto"), BATCHES["packed"]
    if place != "copies":
        require_equal(step(matrix.on_gpus(model, place), batch, **given("packed")), alone(family, batch))
        return
    inputs = {key: x.to("cuda") for key, x in {"input_ids": batch.ids, **given("packed")}.items()}
    with data_parallel():
        require_equal(step(torch.nn.DataParallel(model.to("cuda")), batch, **inputs), alone(family, batch))


@pytest.mark.parametrize(
    ("name", "unpad", "kind"),
    part_of(
        [
            (*how, kind)
            for how in (("auto", False), ("auto", True), ("varlen", False), ("varlen", True), ("sdpa", False))
            for kind in BATCHES
        ],
        kept=[
            *(("auto", False, "packed"), ("auto", True, "left"), ("auto", True, "packed")),
            *(("varlen", False, "left"), ("varlen", True, "right"), ("sdpa", False, "right")),
        ],
    ),
)
def test_copies_of_data_parallel(name: str, kind: str, unpad: bool) -> None:
    model = axattn.apply(build("llama"), name, unpad=unpad).to("cuda")
    inputs = {key: x.to("cuda") for key, x in {"input_ids": BATCHES[kind].ids, **given(kind)}.items()}
    with data_parallel():
        copies = torch.nn.DataParallel(model)
        found = step(copies, BATCHES[kind], **inputs)
    require_equal(found, alone("llama", BATCHES[kind]))


@contextlib.contextmanager
def installed(name: str) -> Iterator[None]:
    """A Hopper machine with one kernel, as a fake."""
    if name != "library":
        with hopper(name):
            yield
        return
    gpu = environment("cuda", 90, sageattention="1.0.6", triton=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "current", classmethod(lambda cls: gpu))
        patch.setitem(sys.modules, "sageattention", sageattention)
        sage.sage_module.cache_clear()
        yield
        sage.sage_module.cache_clear()


LAUNCHED = {
    "sage": {"quantise", "forward"},
    "library": {"sageattn_varlen"},
    "fp8": {"quantise", "quantise_smoothed", "flash_attn_varlen_func"},
    "xformers": {"memory_efficient_attention"},
}


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    part_of(itertools.product(LAUNCHED, (False, True)), kept=zip(LAUNCHED, (False, True, True, False), strict=True)),
)
def test_kernels_launch_on_the_gpu_of_their_layer(name: str, checkpointing: bool) -> None:
    found = {}
    batch = BATCHES["packed"]
    asked: dict[str, Any] = {"attn_implementation": name}
    if name == "library":
        asked = {"attn_implementation": "sage", "kernel_options": {"provider": "library"}}
    with installed(name):
        for place in matrix.PLACES:
            model = build("llama", head_dim=64, num_hidden_layers=4).to(torch.bfloat16)
            model = axattn.apply(model, **asked).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            State.launches.clear()
            found[place] = step(matrix.on_gpus(model, place), batch, position_ids=batch.positions)
            gpus = {0} if place == "one" else {0, 1}
            assert set(State.launches) == {(kernel, gpu) for kernel in LAUNCHED[name] for gpu in gpus}
    assert torch.cuda.current_device() == 0
    for key, expected in found["one"].items():
        assert torch.equal(found["two"][key], expected), key


def test_whole_rows_are_quantised_on_the_gpu_of_their_layer() -> None:
    with hopper("fp8"):
        model = axattn.apply(build("llama", head_dim=16, num_hidden_layers=4), "fp8").train()
        State.launches.clear()
        batch = packed((12,), (12,))
        step(matrix.on_gpus(model, "two"), batch, position_ids=batch.positions)
    assert {gpu for kernel, gpu in State.launches if kernel == "fp8_sdpa_quantize"} == {0, 1}


def test_restore_gives_data_parallel_its_own_copies_back() -> None:
    model = axattn.apply(build("llama"), "auto", unpad=True)
    assert "_replicate_for_data_parallel" in vars(model)
    axattn.restore(model)
    assert "_replicate_for_data_parallel" not in vars(model)


def test_layers_on_another_device_share_one_mask_and_none_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = lazy_mask.LazyMask.on

    def counted(self: Any, device: torch.device) -> Any:
        found = real(self, device)
        made.append(found)
        return found

    def never(self: Any) -> Any:
        raise AssertionError("a dense mask of a packed row")

    monkeypatch.setattr(lazy_mask.LazyMask, "on", counted)
    monkeypatch.setattr(lazy_mask.LazyMask, "dense", never)
    model = matrix.on_gpus(axattn.apply(build("llama", num_hidden_layers=6), "varlen"), "two")
    batch = BATCHES["packed"]
    model(batch.ids, position_ids=batch.positions, use_cache=False)
    assert len(made) == 3  # three of six layers are on the other GPU than the embeddings
    assert len({id(mask) for mask in made}) == 1
