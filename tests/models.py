"""Tiny seeded models of many families, initialised so that attention matters. No test lives here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: tf.LlamaConfig(**{**SMALL, **k}),
    "qwen3": lambda **k: tf.Qwen3Config(**{**SMALL, "head_dim": 16, **k}),
    "mistral": lambda **k: tf.MistralConfig(**{**SMALL, "sliding_window": 5, **k}),
    "mixtral": lambda **k: tf.MixtralConfig(
        **{**SMALL, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": None, **k}
    ),
    "granite": lambda **k: tf.GraniteConfig(**{**SMALL, "attention_multiplier": 0.5, **k}),
    "phi3": lambda **k: tf.Phi3Config(**{**SMALL, "sliding_window": None, **k}),
    "olmo2": lambda **k: tf.Olmo2Config(**{**SMALL, **k}),
    "gemma2": lambda **k: tf.Gemma2Config(
        **{**SMALL, "head_dim": 8, "sliding_window": 5, "layer_types": LAYERS, "attn_logit_softcapping": 2.0, **k}
    ),
    "gemma3": lambda **k: tf.Gemma3TextConfig(
        **{**SMALL, "head_dim": 8, "sliding_window": 5, "layer_types": LAYERS, **k}
    ),
    "gpt_oss": lambda **k: tf.GptOssConfig(
        **{
            **SMALL,
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": LAYERS,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            **k,
        }
    ),
    "deepseek_v3": lambda **k: tf.DeepseekV3Config(
        **{
            **SMALL,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            **k,
        }
    ),
    "llama4": lambda **k: tf.Llama4TextConfig(
        **{
            **SMALL,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["chunked_attention", "full_attention"],
            **k,
        }
    ),
    "opt": lambda **k: tf.OPTConfig(
        **{
            **{x: SMALL[x] for x in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
            "ffn_dim": 48,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": True,
            "pad_token_id": 0,
            "dropout": 0.0,
            **k,
        }
    ),
}
"""Decoder families that run through Transformers' attention interface."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LINEAR = {f"linear_{side}_head_dim": 8 for side in ("key", "value")}
_LINEAR |= {f"linear_num_{side}_heads": 2 for side in ("key", "value")}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
HYBRIDS: dict[str, Callable[..., Any]] = {
    "lfm2": lambda: tf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], block_ff_dim=48),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **SMALL,
        **_LINEAR,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "bamba": lambda: tf.BambaConfig(**SMALL, **_MAMBA, attn_layer_indices=[1]),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **SMALL | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=64
    ),
    "minimax": lambda: tf.MiniMaxConfig(
        **SMALL, **_EXPERTS, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
    "falcon_h1": lambda: tf.FalconH1Config(**SMALL, **_MAMBA | {"mamba_n_heads": 4}, mamba_d_ssm=32),
}
"""Families with layers that mix tokens outside of attention."""

REFUSED: dict[str, Callable[..., Any]] = {
    "bloom": lambda **k: tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4, **k),
    "falcon": lambda **k: tf.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **k
    ),
    "gpt_neo": lambda **k: tf.GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]], **k
    ),
}
"""Families whose attention is their own code."""


def build(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A tiny causal model in evaluation mode, float32, with weights large enough that attention moves the logits."""
    torch.manual_seed(seed)
    config = (CONFIGS | REFUSED | HYBRIDS)[family](**overrides)
    model = tf.AutoModelForCausalLM.from_config(config)
    amplify(model)
    return model.eval()


def amplify(model: torch.nn.Module) -> None:
    """Make attention sharp: with Transformers' small initial weights a dropped feature would hide in the noise."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and any(part in name for part in ("q_", "k_", "v_", "qkv", "kv_", "o_proj", "out_proj")):
            parameter.data.mul_(10.0)
        if "sinks" in name:
            parameter.data.normal_(std=2.0)


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """int64 ``[rows, length]`` random token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (rows, length), generator=generator)


def positions(*rows: tuple[int, ...]) -> torch.Tensor:
    """Positions of packed rows from document lengths: ``positions((3, 2), (5,))``."""
    return torch.tensor([[i for length in row for i in range(length)] for row in rows])


def alone(model: Any, ids: torch.Tensor, lengths: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
    """Logits ``[1, S, V]`` of the documents of one row, each run alone on eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        parts, start = [], 0
        for length in lengths:
            parts.append(model(ids[:, start : start + length], use_cache=False, **kwargs).logits)
            start += length
    finally:
        model.config._attn_implementation = before
    return torch.cat(parts, 1)
