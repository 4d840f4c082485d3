"""TRL's GRPOTrainer: the prompt of a group runs once for all completions (`share_prefixes=True`).

python examples/grpo.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from small import arguments, documents
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import axattn


def vowels(completions: list[str], **_: object) -> list[float]:
    """A reward: the share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def main(folder: str, name: str = "auto") -> float:
    """Train a few steps; returns the mean loss."""
    model = axattn.from_pretrained(folder, attn_implementation=name, share_prefixes=True)
    rows = []  # of the batches that are learned from
    model.model.layers[0].register_forward_pre_hook(
        lambda module, given: rows.append(tuple(given[0].shape[:2])) if module.training else None
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            model=axattn.prepare_for_training(model),
            reward_funcs=vowels,
            args=GRPOConfig(
                output,
                max_steps=3,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=8,
                report_to=[],
                bf16=False,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": text[:64]} for text in documents()]),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        loss = trainer.train().training_loss
    learned = [row for row in rows if row[0] == 1]
    print(f"loss {loss:.2f}")
    print(f"2 groups of 4 completions, 8 rows of 72 tokens, ran as 1 row of {learned[0][1]}")
    return float(loss)


if __name__ == "__main__":
    main(*arguments(__doc__))
