"""The real kernels on a real GPU: ``pytest -m gpu``. Imports neither pydantic, datasets nor trl."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

import axattn
from axattn.attention.interface import attend
from axattn.documents.boundaries import Segments
from axattn.hf.mask_functions import recognise
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import lazy_mask
from tests.models import build, positions, tokens

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("AXATTN_GPU_TESTS_ON", "cuda")  # "cpu" runs these tests without a GPU, to check the tests
LENGTHS = (70, 130, 33, 23)


class Attention(torch.nn.Module):
    is_causal = True


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def packed_mask(rows: int, window: int | None) -> LazyMask:
    from transformers import masking_utils as mu

    total = sum(LENGTHS)
    function = mu.causal_mask_function if window is None else mu.sliding_window_causal_mask_function(window)
    assert recognise(function) is not None
    edges = [0]
    for length in LENGTHS:
        edges.append(edges[-1] + length)
    segments = Segments((tuple(edges),) * rows, torch.device(DEVICE))
    return lazy_mask(rows, total, total, mask_function=function, device=DEVICE).with_segments(segments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [(8, 8, 64, 64), (8, 2, 128, 128), (4, 4, 96, 64)])
def test_varlen_equals_fp32_attention_on_each_document_forward_and_backward(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, dim: int, value_dim: int
) -> None:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    shapes = ((2, heads, total, dim), (2, kv_heads, total, dim), (2, kv_heads, total, value_dim))
    inputs = [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]
    out, _ = attend("varlen", Attention(), *inputs, packed_mask(2, window))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    parts, edges = [], [0]
    for length in LENGTHS:
        edges.append(edges[-1] + length)
    for a, b in pairwise(edges):
        index = torch.arange(b - a, device=DEVICE)
        seen = index[None] <= index[:, None]
        if window is not None:
            seen &= index[None] > index[:, None] - window
        q, k, v = (x[:, :, a:b] for x in exact)
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2))
    expected = torch.cat(parts, 1)
    budget = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert relative(out, expected) < budget
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((out.double() * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < 2 * budget


FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "llama4", "qwen3_next", "bamba")


@pytest.mark.parametrize("described_by", ["positions", "document ids"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_equal_their_documents_alone(family: str, dtype: torch.dtype, described_by: str) -> None:
    model = build(family).to(DEVICE).to(dtype)
    axattn.apply(model, "auto")
    ids = tokens(2, 21).to(DEVICE)
    where = positions((7, 11, 3), (5, 9, 7)).to(DEVICE)
    with torch.no_grad():
        given = {"position_ids": where} if described_by == "positions" else {"attention_mask": (where == 0).cumsum(-1)}
        packed = model(ids, **given).logits
        rows = [
            torch.cat([model(ids[r : r + 1, a:b]).logits for a, b in pairwise(edges)], 1)
            for r, edges in enumerate(((0, 7, 18, 21), (0, 5, 14, 21)))
        ]
    assert relative(packed, torch.cat(rows)) < (1e-4 if dtype == torch.float32 else 5e-2)


def test_a_changed_document_leaves_the_others_bit_identical() -> None:
    model = axattn.apply(build("llama").to(DEVICE).to(torch.bfloat16), "auto")
    ids = tokens(1, 21).to(DEVICE)
    changed = ids.clone()
    changed[0, 8:14] = 5
    with torch.no_grad():
        before, after = (model(x, position_ids=positions((7, 11, 3)).to(DEVICE)).logits for x in (ids, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert torch.equal(before[:, 18:], after[:, 18:])
    assert not torch.equal(before[:, 7:18], after[:, 7:18])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_and_generation_equal_eager(side: str) -> None:
    model = build("llama").to(DEVICE)
    ids, mask = tokens(2, 12).to(DEVICE), torch.ones(2, 12, dtype=torch.long, device=DEVICE)
    mask[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    with torch.no_grad(), axattn.using(model, "eager"):
        expected = model(ids, attention_mask=mask).logits
    axattn.apply(model, "auto")
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
    assert relative(found[mask.bool()], expected[mask.bool()]) < 1e-4
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if side == "left":
        on_axattn = model.generate(ids, attention_mask=mask, **options)
        with axattn.using(model, "eager"):
            assert torch.equal(on_axattn, model.generate(ids, attention_mask=mask, **options))


@torch.no_grad()
@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pooler_reads_what_eager_gives_it(side: str, dtype: torch.dtype, unpad: bool) -> None:
    torch.manual_seed(0)
    model: Any = tf.BertModel(tf.BertConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4)).eval()
    model = model.to(DEVICE, dtype)
    ids, mask = tokens(4, 60).to(DEVICE), torch.ones(4, 60, dtype=torch.long, device=DEVICE)
    for row, padding in enumerate((0, 20, 45, 7)):
        mask[row, slice(60 - padding, 60) if side == "right" else slice(0, padding)] = 0
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, attention_mask=mask)
    found = axattn.apply(model, "auto", unpad=unpad)(input_ids=ids, attention_mask=mask)
    budget = 1e-5 if dtype is torch.float32 else 2e-2
    assert relative(found.pooler_output, expected.pooler_output) < budget
    real = mask.bool()
    assert relative(found.last_hidden_state[real], expected.last_hidden_state[real]) < budget


def test_a_packed_training_run_follows_the_eager_run(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(5)
    corpus = [{"input_ids": torch.randint(3, 97, (int(n),), generator=generator).tolist()} for n in range(5, 45)]
    losses = {}
    for name in ("eager", "auto"):
        model = axattn.prepare_for_training(axattn.apply(build("llama"), name))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            optim="sgd",
            bf16=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            seed=1,
            use_cpu=DEVICE == "cpu",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=corpus, data_collator=axattn.PackingCollator(64))
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["auto"] == pytest.approx(losses["eager"], rel=2e-2)


def test_one_sync_a_forward_not_one_a_layer() -> None:
    counts = []
    for layers in (2, 8):
        model = axattn.apply(build("llama", num_hidden_layers=layers).to(DEVICE).to(torch.bfloat16), "varlen")
        ids, where = tokens(1, 21).to(DEVICE), positions((7, 11, 3)).to(DEVICE)
        with torch.no_grad():
            model(ids, position_ids=where, use_cache=False)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                model(ids, position_ids=where, use_cache=False)
        counts.append(sum(e.count for e in profile.key_averages() if e.key in ("aten::item", "aten::nonzero")))
    assert counts[0] == counts[1]
