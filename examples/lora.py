"""PEFT LoRA on any kernel: patches survive ``get_peft_model``, before or after.

python examples/lora.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import tempfile

from peft import LoraConfig, get_peft_model
from small import arguments, documents
from transformers import AutoTokenizer, Trainer, TrainingArguments

import axattn


def main(folder: str, name: str = "auto") -> float:
    """Train adapters for a few steps; returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = axattn.from_pretrained(folder, attn_implementation=name)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    axattn.prepare_for_training(model)
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model,
            TrainingArguments(output, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[]),
            train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in documents()],
            data_collator=axattn.PackingCollator(max_length=256, pad_token_id=tokenizer.pad_token_id),
        )
        loss = trainer.train().training_loss
    print(f"loss {loss:.2f}")
    print(axattn.status(model))
    return float(loss)


if __name__ == "__main__":
    main(*arguments(__doc__))
