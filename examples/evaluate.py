"""Evaluation as harnesses do it: log-likelihoods of choices in one padded batch, whose prompt runs once.

python examples/evaluate.py [MODEL_FOLDER] [NAME]
"""

from __future__ import annotations

import torch
from small import arguments
from transformers import AutoTokenizer

import axattn


@torch.no_grad()
def main(folder: str, name: str = "auto") -> list[float]:
    """The log-likelihood of each choice."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = axattn.from_pretrained(folder, attn_implementation=name, share_prefixes=True, unpad=True).eval()
    tokens = []  # that run through the layers
    model.model.layers[0].register_forward_pre_hook(lambda _, given: tokens.append(given[0][..., 0].numel()))
    prompt = tokenizer("The kernel that serves sliding windows on a CPU is")["input_ids"]
    choices = [tokenizer(text)["input_ids"] for text in (" varlen", " sage", " flash attention", " fp8")]

    def score(chosen: list[list[int]]) -> list[float]:
        rows = [prompt + choice for choice in chosen]
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        logits = model(**batch, use_cache=False).logits.log_softmax(-1)
        taken = logits[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return [float(row[len(prompt) - 1 :][: len(choice)].sum()) for row, choice in zip(taken, chosen, strict=True)]

    together, ran = score(choices), tokens[0]
    alone = [score([choice])[0] for choice in choices]
    worst = max(abs(a - b) for a, b in zip(together, alone, strict=True))
    places = len(choices) * (len(prompt) + max(map(len, choices)))
    print(f"{len(choices)} choices, {places} places in the batch: {ran} tokens ran")
    print(f"log-likelihoods {', '.join(f'{value:.1f}' for value in together)}; one by one, off by {worst:.4f}")
    assert worst < 1e-3
    assert ran < places / 2
    return together


if __name__ == "__main__":
    main(*arguments(__doc__))
