"""QLoRA: adapters on weights in 4 bits, packed rows on any kernel. Needs bitsandbytes; a CPU does.

python examples/qlora.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from small import arguments, documents
from transformers import AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

import axattn


def main(folder: str, name: str = "auto") -> float:
    """Train adapters for a few steps; returns the mean loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = axattn.from_pretrained(
        folder,
        attn_implementation=name,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    axattn.prepare_for_training(model)  # in the place of peft.prepare_model_for_kbit_training
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model,
            TrainingArguments(
                output, max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], use_cpu=True
            ),
            train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in documents()],
            data_collator=axattn.PackingCollator(max_length=256, pad_token_id=tokenizer.pad_token_id),
        )
        loss = trainer.train().training_loss
    print(f"loss {loss:.2f}; {type(model.base_model.model.model.layers[0].mlp.up_proj).__name__} below the adapters")
    print(axattn.status(model))
    return float(loss)


if __name__ == "__main__":
    main(*arguments(__doc__))
