"""TRL's trainers with rewards and unpaired preferences, and axattn backends given to TRL itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import axattn
from tests.e2e.test_trainer import corpus
from tests.e2e.test_trl import COMMON, sft, sharing, stock, tokenizer
from tests.models import build
from tests.sampling import part_of

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = [" ".join(f"w{i}" for i in example["input_ids"] if i < 97) for example in corpus(24)]
NAMES: list[tuple[str, dict[str, Any]]] = [
    ("auto", {}),
    ("varlen", {"unpad": True}),
    ("auto", {"share_prefixes": True}),
]
FOLLOWS = {"rel": 1e-3, "abs": 1e-5}


def history(trainer: Any) -> dict[str, list[float]]:
    """Losses and gradient norms of a run."""
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {key: [entry[key] for entry in log] for key in ("loss", "grad_norm")}


def follows(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert len(expected["loss"]) == COMMON["max_steps"]
    assert min(expected["grad_norm"]) > 1e-2
    for key, wanted in expected.items():
        assert found[key] == pytest.approx(wanted, **FOLLOWS), key


def distinct(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within each group of completions."""
    return [len(set(text.split())) + 0.1 * i for i, text in enumerate(completions)]


@pytest.mark.parametrize(
    ("method", "name", "options"),
    part_of(
        [(method, *name) for method in ("GRPO", "RLOO") for name in NAMES],
        kept=[("GRPO", "auto", {"share_prefixes": True}), ("RLOO", "varlen", {"unpad": True})],
    ),
)
def test_rollouts_and_their_updates_follow_eager(
    tmp_path: Path, method: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions are sampled from left-padded prompts, scored against a reference model, and learned from."""
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1}

    def run(model: Any) -> dict[str, list[float]]:
        settings = getattr(trl, f"{method}Config")(output_dir=str(tmp_path / "out"), **COMMON | arguments)
        data = datasets.Dataset.from_list([{"prompt": text} for text in WORDS])
        trainer = getattr(trl, f"{method}Trainer")(
            model=model, reward_funcs=distinct, args=settings, train_dataset=data, processing_class=tokenizer()
        )
        return history(trainer)

    expected = run(AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager"))
    model = axattn.from_pretrained(tmp_path / "model", attn_implementation=name, **options)
    shared = sharing(monkeypatch)
    follows(run(axattn.prepare_for_training(model)), expected)
    assert bool(shared) == ("share_prefixes" in options)


@pytest.mark.parametrize(("name", "options"), part_of(NAMES, kept=NAMES[2:]))
def test_unpaired_preferences_follow_eager(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    rows = [
        {"prompt": a, "completion": f" {b}", "label": i % 2 == 0}
        for i, (a, b) in enumerate(zip(WORDS[::2], WORDS[1::2], strict=True))
    ]

    def run(model: Any) -> dict[str, list[float]]:
        settings = trl.KTOConfig(output_dir=str(tmp_path), **COMMON | {"max_length": 96})
        reference = build("llama", seed=1)
        reference.set_attn_implementation("eager")
        data = datasets.Dataset.from_list(rows)
        return history(
            trl.KTOTrainer(
                model=model, ref_model=reference, args=settings, train_dataset=data, processing_class=tokenizer()
            )
        )

    expected = run(stock())
    follows(run(axattn.prepare_for_training(axattn.apply(build("llama"), name, **options))), expected)


@pytest.mark.parametrize(("name", "options"), part_of(NAMES, kept=NAMES[:1]))
def test_a_reward_model_follows_eager(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    rows = [{"chosen": a, "rejected": b} for a, b in zip(WORDS[::2], WORDS[1::2], strict=True)]

    def run(name: str, **options: Any) -> dict[str, list[float]]:
        torch.manual_seed(0)
        config = build("llama").config
        config.num_labels, config.pad_token_id = 1, 0
        model = LlamaForSequenceClassification(config)
        model.set_attn_implementation("eager")
        if name != "eager":
            axattn.apply(model, name, **options)
        settings = trl.RewardConfig(output_dir=str(tmp_path), **COMMON | {"max_length": 96})
        data = datasets.Dataset.from_list(rows)
        trainer = trl.RewardTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer())
        return history(trainer)

    follows(run(name, **options), run("eager"))


@pytest.mark.parametrize("name", part_of(["auto", "varlen"], kept=["auto"]))
def test_a_name_that_trl_hands_to_transformers_packs_without_a_leak(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody calls `axattn.from_pretrained` here: TRL loads the model itself, with ``model_init_kwargs``."""
    build("llama").save_pretrained(tmp_path / "model")
    arguments = {"packing": True, "packing_strategy": "bfd", "max_steps": 2}
    applied = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    expected = sft(tmp_path / "a", applied, **arguments)
    init = {"attn_implementation": name, "dtype": "float32"}
    seen: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(trl.SFTTrainer, "compute_loss", keeping(trl.SFTTrainer.compute_loss, seen))
        found = sft(tmp_path / "b", str(tmp_path / "model"), model_init_kwargs=init, **arguments)
    assert found == pytest.approx(expected, rel=1e-5)
    as_one_document = {"input_ids": seen[0]["input_ids"], "labels": seen[0]["labels"]}
    assert stock()(**as_one_document).loss.item() != pytest.approx(expected[0], rel=1e-4)


def keeping(compute_loss: Any, seen: list[dict[str, Any]]) -> Any:
    def run(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(dict(inputs))
        return compute_loss(self, model, inputs, *args, **kwargs)

    return run
