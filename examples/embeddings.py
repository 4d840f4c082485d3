"""Sentence embeddings: an encoder trained with a contrastive loss on padded batches that run without their padding.

python examples/embeddings.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import copy

import torch
from small import arguments, documents, small_encoder
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

import axattn


def embedded(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of each text's last hidden states, of length 1: `[B, D]`."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main(folder: str, name: str = "auto") -> float:
    """Train a few steps; returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = documents()[:16]
    batches = [  # the beginning of a text and its end belong together
        tokenizer([text[part] for text in texts], padding=True, return_tensors="pt")
        for part in (slice(None, 40), slice(40, None))
    ]
    plain = AutoModel.from_pretrained(folder, attn_implementation="eager").train()
    model = axattn.apply(copy.deepcopy(plain), name, unpad=True)
    loss = torch.zeros(())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(8):
        scores = embedded(model, batches[0]) @ embedded(model, batches[1]).T / 0.05
        loss = cross_entropy(scores, torch.arange(len(texts)))
        if step == 0:
            scores = embedded(plain, batches[0]) @ embedded(plain, batches[1]).T / 0.05
            expected = cross_entropy(scores, torch.arange(len(texts)))
            print(f"first loss {loss:.4f}, with eager attention {expected:.4f}")
            assert abs(loss - expected) < 1e-4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    share = sum(int(batch["attention_mask"].sum()) for batch in batches) / sum(
        batch["input_ids"].numel() for batch in batches
    )
    print(f"last loss {loss:.2f}; {share:.0%} of the places of the batches were tokens, and only those ran")
    return float(loss)


if __name__ == "__main__":
    main(*arguments(__doc__, make=small_encoder))
