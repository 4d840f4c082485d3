"""A hybrid with linear attention (Qwen3-Next): packed documents stay apart in its attention and in its states.

python examples/hybrid.py
"""

from __future__ import annotations

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import axattn


def main() -> float:
    """The largest difference between packed documents and the same documents alone."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    model = axattn.apply(Qwen3NextForCausalLM(config).eval(), "auto")
    documents = [torch.arange(3, 3 + length) for length in (7, 12, 5)]
    batch = axattn.PackingCollator(None)([{"input_ids": document.tolist()} for document in documents])
    del batch["labels"]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        order = [batch["input_ids"][0, a:b] for a, b in batch["cu_seq_lens_q"].unfold(0, 2, 1).tolist()]
        alone = torch.cat([model(document[None], use_cache=False).logits[0] for document in order])
        axattn.restore(model)
        plain = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    with_axattn, stock = float((packed - alone).abs().max()), float((plain - alone).abs().max())
    print(f"packed against alone, largest difference of logits: {with_axattn:.4f}; plain Transformers: {stock:.4f}")
    assert with_axattn < 1e-4 < stock
    return with_axattn


if __name__ == "__main__":
    main()
