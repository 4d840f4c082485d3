"""TRL's SFTTrainer with its own packing: documents stay apart although TRL emits an all-ones mask.

python examples/sft.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from small import arguments, documents
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import axattn


def main(folder: str, name: str = "auto") -> float:
    """Train a few steps; returns the last loss."""
    model = axattn.from_pretrained(folder, attn_implementation=name)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                output,
                max_steps=6,
                per_device_train_batch_size=2,
                packing=True,
                max_length=256,
                learning_rate=3e-3,
                report_to=[],
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"text": documents()}),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        loss = trainer.train().training_loss
    print(f"loss {loss:.2f}")
    print(axattn.status(model))
    return float(loss)


if __name__ == "__main__":
    main(*arguments(__doc__))
