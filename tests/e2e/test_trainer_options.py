"""Options of Transformers' Trainer that people use, each on packed rows against padded documents on eager."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

import axattn
from tests.documents.test_input_hook import qwen_vl
from tests.e2e.test_trainer import corpus, padded, train
from tests.models import build
from tests.sampling import part_of

pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    ("name", "precision"),
    part_of(
        itertools.product(("auto", "varlen"), ("fp32", "bf16 autocast", "bf16 weights")),
        kept=[("auto", "bf16 weights"), ("varlen", "bf16 autocast")],
    ),
)
def test_every_precision_follows_padded_documents(tmp_path: Path, precision: str, name: str) -> None:
    options = {"bf16": precision == "bf16 autocast"}
    dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
    stock = build("llama").to(dtype)
    stock.set_attn_implementation("eager")
    _, expected = train(tmp_path / "a", stock, padded, **options)
    model = axattn.prepare_for_training(axattn.apply(build("llama").to(dtype), name))
    _, found = train(tmp_path / "b", model, **options)
    assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 5e-3)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("reentrant", part_of([True, False], kept=[True]))
def test_both_kinds_of_checkpointing_train_the_same(tmp_path: Path, reentrant: bool) -> None:
    plain = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    _, expected = train(tmp_path / "a", plain)
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    _, found = train(tmp_path / "b", model, gradient_checkpointing=True, **kwargs)
    assert found == expected
    served = axattn.status(model).layers[0].served["varlen"]
    assert served == 2 * axattn.status(plain).layers[0].served["varlen"]  # every forward ran twice
    for (path, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), path


@pytest.mark.nightly  # in `make test`: tests/attention/test_recompilation.py, without a Trainer
@pytest.mark.parametrize("checkpoint", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_compiled_run_trains_the_same(tmp_path: Path, checkpoint: dict[str, bool] | None) -> None:
    torch._dynamo.reset()
    plain, model = (
        axattn.prepare_for_training(axattn.apply(build("llama", num_hidden_layers=1), "varlen")) for _ in range(2)
    )
    _, expected = train(tmp_path / "a", plain, max_steps=3)
    options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    if checkpoint is not None:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpoint}
    _, found = train(tmp_path / "b", model, **options)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("workers", part_of([0, 2], kept=[2]))
def test_groups_by_length_and_workers_change_nothing_but_the_order(tmp_path: Path, workers: int) -> None:
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    options = {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": workers}
    stock = build("llama")
    stock.set_attn_implementation("eager")
    _, expected = train(tmp_path / "a", stock, padded, **options)
    _, found = train(tmp_path / "b", model, **options)
    assert found == pytest.approx(expected, rel=1e-4)


def test_packed_rows_end_in_the_same_loss_when_accumulated_in_uneven_parts(tmp_path: Path) -> None:
    """Micro-batches hold different numbers of tokens: the loss is a mean over all of them, not of their means."""
    stock = build("llama")
    stock.set_attn_implementation("eager")
    _, expected = train(tmp_path / "a", stock, padded, max_steps=2, per_device_train_batch_size=16)
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    parts = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    _, found = train(tmp_path / "b", model, **parts)
    assert found == pytest.approx(expected, rel=1e-4)


def left_padded(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    size = max(len(e["input_ids"]) for e in examples)
    short = [size - len(e["input_ids"]) for e in examples]
    ids = torch.tensor([[0] * n + e["input_ids"] for n, e in zip(short, examples, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (size - n) for n in short])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_evaluation_that_generates_gives_eager_s_tokens(tmp_path: Path) -> None:
    def predicted(model: Any, folder: Path) -> Any:
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            predict_with_generate=True,
            generation_max_length=40,
            report_to=[],
            disable_tqdm=True,
            per_device_eval_batch_size=4,
        )
        model.generation_config.do_sample = False
        trainer = Seq2SeqTrainer(model, arguments, data_collator=left_padded)
        return trainer.predict(corpus(8))

    stock = build("llama")
    stock.set_attn_implementation("eager")
    expected = predicted(stock, tmp_path / "a")
    model = axattn.apply(build("llama"), "auto")
    found = predicted(model, tmp_path / "b")
    assert (found.predictions == expected.predictions).all()
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-4)


def test_evaluation_between_packed_steps_sees_no_leak(tmp_path: Path) -> None:
    """Packed in training, padded in evaluation, in one run: the losses of a run that never packs."""

    def run(model: Any, folder: Path, collator: Any) -> list[float]:
        trainer, _ = train(folder, model, collator, max_steps=1)
        trainer.data_collator = padded
        return [trainer.evaluate(corpus(6))["eval_loss"], trainer.evaluate(corpus(3))["eval_loss"]]

    stock = build("llama")
    stock.set_attn_implementation("eager")
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "auto"))
    expected = run(stock, tmp_path / "a", padded)
    assert run(model, tmp_path / "b", axattn.PackingCollator(64)) == pytest.approx(expected, rel=1e-4)


def test_a_saved_folder_is_as_stock_transformers_writes_it(tmp_path: Path) -> None:
    """Ready to push: the same files, the same config, the same keys; it loads without axattn and gives its logits."""
    model = axattn.apply(build("gemma2"), "auto")
    trainer, _ = train(tmp_path / "run", model)
    trainer.save_model(str(tmp_path / "axattn"))
    build("gemma2").save_pretrained(tmp_path / "stock")
    files = {f.name for f in (tmp_path / "axattn").iterdir()} - {"training_args.bin"}
    assert files == {f.name for f in (tmp_path / "stock").iterdir()}
    configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("axattn", "stock")]
    assert configs[0] | {"use_cache": True} == configs[1] | {"use_cache": True}
    assert "axattn" not in (tmp_path / "axattn" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "axattn", attn_implementation="eager")
    ids = torch.tensor([corpus(1)[0]["input_ids"]])
    assert torch.allclose(again(ids).logits, model.eval()(ids).logits, atol=1e-4)


def test_a_vision_language_model_s_text_cache_does_not_leak(tmp_path: Path) -> None:
    """Trainer turns ``use_cache`` off on the outer config alone; text_config's stays on."""
    stock = qwen_vl()
    stock.set_attn_implementation("eager")
    _, expected = train(tmp_path / "a", stock, padded)
    model = axattn.apply(qwen_vl(), {"": "auto", "text_config": "auto", "vision_config": "sdpa"})
    assert model.config.text_config.use_cache is not False
    _, found = train(tmp_path / "b", model)
    assert found == pytest.approx(expected, rel=1e-3)


class Raises(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_a_model_that_can_be_restored(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = build("llama")
    before = dict(vars(model.config))
    axattn.prepare_for_training(axattn.apply(model, "varlen"))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(
        model, arguments, train_dataset=corpus(), data_collator=axattn.PackingCollator(64), callbacks=[Raises()]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    axattn.restore(model)
    assert {k: v for k, v in vars(model.config).items() if k != "use_cache"} == {
        k: v for k, v in before.items() if k != "use_cache"
    }
    assert not any(m._forward_pre_hooks for m in model.modules())
