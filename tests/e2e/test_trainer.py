"""Transformers' own Trainer with axattn's collator: packed training equals training on each document alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import axattn
from tests.models import build
from tests.sampling import part_of

pytest.importorskip("accelerate")


def corpus(count: int = 32) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, 30, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 97, (n,), generator=generator).tolist()} for n in lengths]


def train(folder: Path, model: Any, collator: Any = None, **kwargs: Any) -> tuple[Trainer, list[float]]:
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    options |= {
        "max_grad_norm": 1e9,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "seed": 1,
    }
    arguments = TrainingArguments(output_dir=str(folder), disable_tqdm=True, **{**options, **kwargs})
    trainer = Trainer(model, arguments, train_dataset=corpus(), data_collator=collator or axattn.PackingCollator(64))
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def padded(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """One document a row, right-padded: the plain way to train on the same batch."""
    size = max(len(e["input_ids"]) for e in examples)
    rows = [e["input_ids"] + [0] * (size - len(e["input_ids"])) for e in examples]
    ids = torch.tensor(rows)
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (size - len(e["input_ids"])) for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize(
    ("family", "accumulate"),
    part_of(
        itertools.product(("llama", "gemma2", "mistral"), (1, 2)),
        kept=[("gemma2", 1), ("mistral", 2)],
    ),
)
def test_a_packed_run_follows_the_run_on_padded_documents(tmp_path: Path, family: str, accumulate: int) -> None:
    options = {"gradient_accumulation_steps": accumulate, "max_steps": 4 // accumulate}
    stock = build(family)
    stock.set_attn_implementation("eager")
    _, expected = train(tmp_path / "a", stock, padded, **options)
    model = axattn.prepare_for_training(axattn.apply(build(family), "auto"))
    _, found = train(tmp_path / "b", model, **options)
    assert found == pytest.approx(expected, rel=1e-4)
    for (name, a), (_, b) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name


def test_the_cache_left_on_and_many_rows_do_not_leak(tmp_path: Path) -> None:
    """Nothing prepared, the default configuration of a model: what leaks in Transformers itself."""
    stock = build("llama")
    stock.set_attn_implementation("eager")
    _, expected = train(tmp_path / "a", stock, padded)
    model = axattn.apply(build("llama"), "varlen")
    model.config.use_cache = True
    _, found = train(tmp_path / "b", model, axattn.PackingCollator(64, pad_rows=True))
    assert found == pytest.approx(expected, rel=1e-4)


def test_checkpointing_bf16_and_workers_train(tmp_path: Path) -> None:
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    _, losses = train(
        tmp_path,
        model,
        bf16=True,
        gradient_checkpointing=True,
        dataloader_num_workers=1,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert len(losses) == 4
    assert all(torch.isfinite(torch.tensor(losses)))
    assert axattn.status(model).layers[0].served["varlen"] >= 8  # forward and recomputation


def test_a_run_resumes_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    through = axattn.apply(build("llama"), "varlen")
    train(tmp_path / "a", through, save_strategy="steps", save_steps=2)
    resumed = axattn.from_pretrained(tmp_path / "a" / "checkpoint-2", attn_implementation="varlen")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "b"),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        seed=1,
        disable_tqdm=True,
    )
    trainer = Trainer(resumed, arguments, train_dataset=corpus(), data_collator=axattn.PackingCollator(64))
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, a), (_, b) in zip(through.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trl_takes_the_collator(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 2}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    model = axattn.apply(build("llama"), "varlen")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(corpus()),
        processing_class=tokenizer,
        data_collator=axattn.PackingCollator(64),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
