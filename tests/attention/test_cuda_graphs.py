"""``torch.compile(mode="reduce-overhead")``: nothing is read on the host while a part of a graph is recorded."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from tests.fakes.machine import hopper
from tests.models import build, tokens
from tests.parallel_jobs import compare, gradients, packed_batch
from tests.recorded import Recording
from tests.sampling import part_of


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def machine(name: str) -> Any:
    return hopper("sage") if name == "sage" else contextlib.nullcontext()


def padded_batch(seed: int) -> dict[str, torch.Tensor]:
    ids, mask = tokens(2, 24, seed), torch.ones(2, 24, dtype=torch.long)
    mask[1, 24 - seed :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run(model: Any, batch: dict[str, torch.Tensor], training: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.set_grad_enabled(training):
        loss = model(**batch, use_cache=False).loss
    if training:
        loss.backward()
    return loss.detach(), {k.removeprefix("_orig_mod."): v for k, v in gradients(model).items()} if training else {}


@pytest.mark.parametrize(
    ("name", "what", "training"),
    part_of(
        [
            ("varlen", "model", True),
            ("varlen", "layers", True),
            ("varlen", "layers", False),
            ("auto", "model", True),
            ("sdpa", "model", True),
            ("sage", "model", True),
            ("sage", "layers", True),
        ],
        kept=[("auto", "model", True)],
    ),
)
def test_nothing_is_read_while_a_region_is_recorded(name: str, what: str, training: bool) -> None:
    batch_of = padded_batch if name == "sdpa" else packed_batch  # stock would leak packed rows here
    with machine(name):
        reference, model = (axattn.apply(build("llama", num_hidden_layers=1), name).train(training) for _ in range(2))
        recording, runs = Recording(), model
        if what == "model":
            runs = torch.compile(model, backend=recording, fullgraph=True)
        else:
            for layer in model.model.layers:
                layer.compile(backend=recording, fullgraph=True)
        for seed in (1, 2):
            loss, grads = run(reference, batch_of(seed), training)
            mine, found = run(runs, batch_of(seed), training)
            assert torch.allclose(mine, loss, rtol=1e-5)
            assert not training or compare(found, grads) < 1e-5
    assert not recording.reads
    assert recording.nodes > 0
    assert all(name.startswith("axattn.") for name in recording.cuts), recording.cuts
    assert bool(recording.cuts) == (name != "sdpa")


@pytest.mark.parametrize("name", part_of(["varlen", "sdpa", "sage"], kept=[]))  # `auto`: test_static_decode.py
def test_decoding_over_a_static_cache_is_recorded_once(name: str) -> None:
    model, stock = build("llama", num_hidden_layers=1), Recording()
    model.set_attn_implementation("sdpa")
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0

    def generated(compiler: Recording) -> torch.Tensor:
        how = tf.CompileConfig(backend=compiler, mode=None)
        how._compile_all_devices = True
        asked = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
        out: torch.Tensor = model.generate(
            ids, attention_mask=mask, cache_implementation="static", compile_config=how, **asked
        )
        return out

    expected = generated(stock)
    model.__dict__.pop("_compiled_call", None)
    torch._dynamo.reset()
    with machine(name):
        axattn.apply(model, name)
        on_axattn = Recording()
        assert torch.equal(generated(on_axattn), expected)
        assert torch.equal(generated(on_axattn), expected)
    assert 0 < on_axattn.graphs <= stock.graphs
    assert not on_axattn.reads
    assert not on_axattn.cuts
    assert not stock.cuts


def test_what_reads_in_a_recorded_part_is_seen() -> None:
    @torch.library.custom_op("axattn_tests::largest", mutates_args=())
    def largest(x: torch.Tensor) -> torch.Tensor:
        return x * max(x.tolist())

    largest.register_fake(torch.empty_like)
    recording = Recording()
    found = torch.compile(lambda x: largest(x) + 1, backend=recording)(torch.tensor([1.0, 2.0]))
    assert found.tolist() == [3.0, 5.0]
    assert recording.reads == {"tolist": 1}
    assert not recording.cuts
