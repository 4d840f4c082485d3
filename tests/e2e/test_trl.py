"""TRL's trainers, unchanged but for the name: packing, padding-free batches, preferences."""

from __future__ import annotations

import itertools
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import axattn
from axattn.unpadding import prefixes, shared_prefixes
from tests.e2e.test_trainer import corpus
from tests.models import build
from tests.sampling import part_of

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 97)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    from tokenizers.pre_tokenizers import Whitespace

    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "gradient_checkpointing": False,
    "seed": 1,
}


def sft(folder: Path, model: Any, **options: Any) -> list[float]:
    """Losses of an SFT run."""
    arguments = trl.SFTConfig(output_dir=str(folder), **COMMON | {"max_length": 64} | options)
    data = datasets.Dataset.from_list(corpus(48))
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def stock() -> Any:
    model = build("llama")
    model.set_attn_implementation("eager")
    return model


def test_padding_free_batches_follow_padded_ones(tmp_path: Path) -> None:
    expected = sft(tmp_path / "a", stock())
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    assert sft(tmp_path / "b", model, padding_free=True, max_length=None) == pytest.approx(expected, rel=1e-4)


def test_padded_batches_run_unpadded_under_the_fused_head_of_trl(tmp_path: Path) -> None:
    expected = sft(tmp_path / "a", stock())
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "auto", unpad=True))
    rows: set[int] = set()
    model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.add(args[0].shape[0]))
    assert sft(tmp_path / "b", model) == pytest.approx(expected, rel=1e-4)
    assert rows == {1}


@pytest.mark.parametrize(
    ("name", "strategy"),
    part_of(
        itertools.product(("auto", "varlen"), ("bfd", "bfd_split")), kept=[("auto", "bfd"), ("varlen", "bfd_split")]
    ),
)
def test_packed_batches_are_the_documents_alone(tmp_path: Path, strategy: str, name: str) -> None:
    """TRL packs whole documents into rows; the first loss equals that of the same documents, each run alone."""
    model = axattn.prepare_for_training(axattn.apply(build("llama"), name))
    seen: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    losses = sft(tmp_path, model, packing=True, packing_strategy=strategy, max_steps=1)
    given, reference = seen[0], stock()
    where = given["position_ids"].flatten()
    starts = [*(where == 0).nonzero().flatten().tolist(), len(where)]
    assert len(starts) > 4
    total, count = 0.0, 0
    for a, b in pairwise(starts):
        labels = given["labels"].flatten()[a:b][None]
        targets = int((labels[:, 1:] != -100).sum())
        if targets:
            total += float(reference(given["input_ids"].flatten()[a:b][None], labels=labels).loss.detach()) * targets
            count += targets
    assert losses[0] == pytest.approx(total / count, rel=1e-4)


def test_wrapped_rows_of_trl_are_one_document_as_trl_means_them(tmp_path: Path) -> None:
    expected = sft(tmp_path / "a", stock(), packing=True, packing_strategy="wrapped", max_length=32)
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    found = sft(tmp_path / "b", model, packing=True, packing_strategy="wrapped", max_length=32)
    assert found == pytest.approx(expected, rel=1e-4)


def test_packed_rows_with_a_mask_of_ones_do_not_leak() -> None:
    """What TRL emits when it packs without padding-free: positions and a mask of ones (Transformers leaks there)."""
    from tests.models import alone, positions, tokens

    model = axattn.apply(build("llama"), "auto")
    ids, lengths = tokens(1, 15), (4, 6, 5)
    given = {"position_ids": positions(lengths), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.allclose(model(ids, **given).logits, alone(build("llama"), ids, lengths), atol=1e-4)
        build_eager = stock()
        assert not torch.allclose(build_eager(ids, **given).logits, alone(build("llama"), ids, lengths), atol=1e-2)


def sharing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens of each row that shares prefixes; those of the tests' short prompts are shared too."""
    shared: list[int] = []
    monkeypatch.setattr(prefixes, "SHORTEST", 2)
    run = shared_prefixes.SharePrefixes._run
    monkeypatch.setattr(
        shared_prefixes.SharePrefixes, "_run", lambda *given: shared.append(len(given[-1].shared.tokens)) or run(*given)
    )
    return shared


@pytest.mark.parametrize("how", part_of(["padded", "padding free", "shared prefixes"], kept=["shared prefixes"]))
def test_preferences_follow_eager(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO runs chosen and rejected answers as one batch, with a reference model beside."""
    shared = sharing(monkeypatch)
    more = {"share_prefixes": True} if how == "shared prefixes" else {}
    words = [" ".join(f"w{i}" for i in example["input_ids"] if i < 97) for example in corpus(24)]
    rows = [
        {"prompt": a, "chosen": f" {b}", "rejected": f" {c}"}
        for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=True)
    ]

    def run(folder: Path, prepared: Any) -> list[float]:
        options = COMMON | {"beta": 0.5, "per_device_train_batch_size": 2, "max_length": 96}
        if prepared is not None and how == "padding free":
            options["padding_free"] = True
        arguments = trl.DPOConfig(output_dir=str(folder), **options)
        model, reference = stock(), build("llama", seed=1)
        reference.set_attn_implementation("eager")
        if prepared:
            axattn.prepare_for_training(axattn.apply(model, prepared, **more))
            axattn.apply(reference, prepared, **more)
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = run(tmp_path / "a", None)
    assert len(expected) == 3
    assert run(tmp_path / "b", "auto") == pytest.approx(expected, rel=1e-3)
    assert bool(shared) == bool(more)
