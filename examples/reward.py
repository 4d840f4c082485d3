"""A reward model by TRL's RewardTrainer: padded pairs run as one row of their tokens (`unpad=True`).

python examples/reward.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from small import arguments, preferences
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

import axattn


def main(folder: str, name: str = "auto") -> float:
    """Train a few steps; returns the mean loss."""
    model = axattn.from_pretrained(
        folder,
        attn_implementation=name,
        model_class=AutoModelForSequenceClassification,
        unpad=True,
        num_labels=1,
    )
    rows = []
    model.model.layers[0].register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape[:2])))
    with tempfile.TemporaryDirectory() as output:
        trainer = RewardTrainer(
            model=axattn.prepare_for_training(model),
            args=RewardConfig(
                output, max_steps=4, per_device_train_batch_size=4, report_to=[], bf16=False, use_cpu=True
            ),
            train_dataset=Dataset.from_list(preferences()),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        loss = trainer.train().training_loss
    print(f"loss {loss:.2f}")
    print(f"4 pairs, 8 padded rows, ran as {rows[0][0]} row of {rows[0][1]} tokens")
    assert rows[0][0] == 1
    return float(loss)


if __name__ == "__main__":
    main(*arguments(__doc__))
