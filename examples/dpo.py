"""TRL's DPOTrainer: the prompt of a pair runs once for both answers (`share_prefixes=True`).

python examples/dpo.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from small import arguments, preferences
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import axattn


def main(folder: str, name: str = "auto") -> float:
    """Train a few steps; returns the mean loss."""
    model, reference = (axattn.from_pretrained(folder, attn_implementation=name, share_prefixes=True) for _ in range(2))
    rows = []  # of the batches that run through the layers
    model.model.layers[0].register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape[:2])))
    with tempfile.TemporaryDirectory() as output:
        trainer = DPOTrainer(
            model=axattn.prepare_for_training(model),
            ref_model=reference,
            args=DPOConfig(output, max_steps=4, per_device_train_batch_size=4, report_to=[], bf16=False, use_cpu=True),
            train_dataset=Dataset.from_list(preferences()),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        loss = trainer.train().training_loss
    print(f"loss {loss:.2f}")
    print(f"a batch of 4 pairs, 8 rows of up to 97 tokens, ran as {rows[0][0]} row of {rows[0][1]}")
    assert rows[0][0] == 1
    return float(loss)


if __name__ == "__main__":
    main(*arguments(__doc__))
