"""The training stack on a real GPU: ``pytest -m gpu``. NCCL tests want several GPUs; no pydantic, datasets, trl."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import axattn
from tests.models import build, tokens
from tests.parallel_jobs import gradients, packed_batch, worst

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("AXATTN_GPU_TESTS_ON", "cuda")  # "cpu" runs these tests without a GPU, to check the tests


def moved(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}


def step(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**moved(batch), use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def padded() -> dict[str, Any]:
    ids = tokens(3, 64)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    mask[2, 41:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("name", ["auto", "varlen"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpadded_batches_equal_padded_ones(family: str, name: str, dtype: torch.dtype) -> None:
    model = axattn.apply(build(family, head_dim=32).to(DEVICE, dtype), name, unpad=True).train()
    reference = axattn.apply(build(family, head_dim=32).to(DEVICE), "eager").train()
    (loss, found), (wanted, grads) = step(model, padded()), step(reference, padded())
    budget = 1e-3 if dtype == torch.float32 else 0.1
    assert worst([(loss.float(), wanted), *((found[k].float(), grads[k]) for k in grads)]) < budget


@pytest.mark.parametrize("what", ["model", "layers"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiled_packed_steps_equal_eager_ones_in_two_graphs(family: str, what: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def counted(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    model, reference = (
        axattn.apply(build(family, head_dim=32).to(DEVICE, torch.bfloat16), "auto").train() for _ in range(2)
    )
    runs: Any = model
    if what == "model":
        runs = torch.compile(model, backend=counted, fullgraph=True)
    else:
        for layer in model.model.layers:
            layer.compile(backend=counted, fullgraph=True)
    for seed, length in enumerate((64, 96, 80, 128)):
        batch = packed_batch(seed, length)
        (loss, found), (wanted, grads) = step(runs, batch), step(reference, batch)
        found = {key.removeprefix("_orig_mod."): x for key, x in found.items()}
        assert worst([(loss, wanted), *((found[k], grads[k]) for k in grads)]) < 0.1
    assert graphs <= 2


def test_rows_over_the_ranks_of_one_group() -> None:
    """One process: the exchange on the device itself; more need more GPUs (below)."""
    import torch.distributed as dist

    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, split = (axattn.apply(build("llama", head_dim=32).to(DEVICE), "auto").train() for _ in range(2))
        axattn.sequence_parallel(split, dist.group.WORLD)
        (loss, found), (wanted, grads) = step(split, packed_batch(1)), step(whole, packed_batch(1))
        assert worst([(loss, wanted), *((found[k], grads[k]) for k in grads)]) < 1e-4
    finally:
        dist.destroy_process_group()


def over_nccl(rank: int, world: int, port: int) -> None:
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    whole, split = (axattn.apply(build("llama", head_dim=32).to(rank), "auto").train() for _ in range(2))
    axattn.sequence_parallel(split, dist.group.WORLD)
    batch = {key: x.to(rank) if isinstance(x, torch.Tensor) else x for key, x in packed_batch(1, 26).items()}
    expected, loss = whole(**batch, use_cache=False).loss, split(**batch).loss
    expected.backward()
    loss.backward()
    axattn.parallel.average_gradients(split, dist.group.WORLD)
    grads, found = gradients(whole), gradients(split)
    assert worst([(loss, expected), *((found[k], grads[k]) for k in grads)]) < 1e-3
    dist.destroy_process_group()


def test_rows_over_several_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; this machine has {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(over_nccl, args=(2, 29533), nprocs=2)
