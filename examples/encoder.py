"""Masked language modelling with an encoder: texts are packed into rows, and none attends to another.

python examples/encoder.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import torch
from small import arguments, documents, small_encoder
from transformers import AutoModelForMaskedLM, AutoTokenizer

import axattn


def main(folder: str, name: str = "auto") -> float:
    """Train a few steps; returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = axattn.from_pretrained(folder, attn_implementation=name, model_class=AutoModelForMaskedLM).train()
    random = torch.Generator().manual_seed(0)
    examples = []
    for text in documents()[:24]:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        hidden = torch.rand(len(ids), generator=random) < 0.15
        hidden[0], hidden[1] = False, True  # the collator leaves out the target of a first token
        masked = ids.masked_fill(hidden, tokenizer.mask_token_id).tolist()
        examples.append({"input_ids": masked, "labels": ids.masked_fill(~hidden, -100).tolist()})
    alone = [
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        * sum(label != -100 for label in row["labels"])
        for row in examples
    ]
    count = sum(label != -100 for row in examples for label in row["labels"])
    batch = axattn.PackingCollator(512, pad_token_id=tokenizer.pad_token_id)(examples)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    expected = float(sum(alone).detach()) / count
    print(f"first loss {losses[0]:.4f}; of the texts one by one {expected:.4f}")
    print(f"{len(examples)} texts in {len(batch['input_ids'])} rows; last loss {losses[-1]:.2f}")
    assert abs(losses[0] - expected) < 1e-4
    return losses[-1]


if __name__ == "__main__":
    main(*arguments(__doc__, make=small_encoder))
