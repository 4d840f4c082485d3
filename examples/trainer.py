"""A plain Trainer script: two lines of axattn.

python examples/trainer.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import tempfile

from small import arguments, documents
from transformers import AutoTokenizer, Trainer, TrainingArguments

import axattn


def main(folder: str, name: str = "auto") -> float:
    """Train a few steps; returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = axattn.from_pretrained(folder, attn_implementation=name)  # in the place of AutoModelForCausalLM's
    axattn.prepare_for_training(model)
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model,
            TrainingArguments(
                output, max_steps=8, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[], logging_steps=4
            ),
            train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in documents()],
            data_collator=axattn.PackingCollator(max_length=256, pad_token_id=tokenizer.pad_token_id),
            callbacks=[axattn.VerifyCallback()],  # stops the run if the kernel is wrong on this model
        )
        loss = trainer.train().training_loss
    print(f"loss {loss:.2f}")
    print(axattn.status(model))
    return float(loss)


if __name__ == "__main__":
    main(*arguments(__doc__))
