"""Models and batches that the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def llama(hidden: int, layers: int, heads: int, vocabulary: int) -> Any:
    """A seeded LLaMA; (384, 8, 6, 8192) has 20 M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1 << 16,
    )
    return LlamaForCausalLM(config)


def gemma2(hidden: int, layers: int, heads: int, vocabulary: int, window: int, dropout: float = 0.0) -> Any:
    """A seeded Gemma 2 on eager: softcap 50, windowed and full layers in turn, two heads to a KV head."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=1 << 16,
        sliding_window=window,
        attn_logit_softcapping=50.0,
        attention_dropout=dropout,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").train()


def packed(tokens: int, documents: int, vocabulary: int) -> dict[str, Any]:
    """One row of documents of equal length."""
    import torch

    length = tokens // documents
    ids = torch.randint(0, vocabulary, (1, tokens))
    where = torch.arange(length).repeat(documents)[None]
    return {"input_ids": ids, "labels": ids, "position_ids": where, "use_cache": False}


def step(model: Any, batch: dict[str, Any]) -> Callable[[], object]:
    """One forward and backward."""

    def run() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return run
