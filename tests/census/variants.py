"""What architectures do when a config asks for more than its defaults: windows, other kinds of layers, no causality."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]
MASKED = 17
"""A token that is in some of the batches' documents."""


def _each(*model_types: str, **values: Any) -> dict[str, Values]:
    return dict.fromkeys(model_types, values)


_ROPE = {"rope_theta": 1e4, "factor": 4.0}
_LONGROPE = {
    **_ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 6,
}
_SCALED = {
    **_ROPE,
    "rope_type": "yarn",
    "type": "yarn",
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}
_MIXED = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}

_BY_SETTING: dict[str, dict[str, Values]] = {
    "sliding window": {
        **_each(
            "dots1", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2", sliding_window=6
        ),
        **_each("cohere_compass_text", "exaone4", "laguna", "mellum", "ministral", **_MIXED),
        **_each("qwen2", "qwen2_moe", "qwen3", "smollm3", use_sliding_window=True, **_MIXED),
        **_each("deepseek_v4", layer_types=["sliding_attention", "sliding_attention"]),
        **_each("zaya", layer_types=["hybrid", "hybrid_sliding"], sliding_window=6),
    },
    "full attention alone": {
        **_each("lfm2_moe", "minimax_m3_vl_text", "qwen3_next", layer_types=["full_attention", "full_attention"]),
        **_each("granitemoehybrid", layer_types=["attention", "attention"], position_embedding_type="rope"),
    },
    "is_causal=False": _each(
        "gemma2", "gemma3_text", "gpt2", "gpt_oss", "llama", "llama4_text", "mistral", "qwen3", is_causal=False
    ),
    "bidirectional": {
        **_each("gemma", "gemma2", "gemma3_text", use_bidirectional_attention=True),
        **_each("gemma4_text", use_bidirectional_attention="all"),
    },
    "LongRoPE": {
        **_each("llama", "qwen3", head_dim=8, rope_parameters=_LONGROPE),
        **_each("phi3", original_max_position_embeddings=6, rope_parameters=_LONGROPE),
    },
    "dynamic NTK": _each("llama", rope_parameters={**_ROPE, "rope_type": "dynamic"}, max_position_embeddings=8),
    "queries scaled by position": {
        **_each("llama4_text", floor_scale=4, no_rope_layers=[1, 0]),
        **_each("ministral3", rope_parameters=_SCALED),
        **_each("mistral4", rope_parameters=_SCALED | {"partial_rotary_factor": 0.5}),
    },
    "no RoPE": _each("llama4_text", no_rope_layers=[0, 1]),
    "wide heads": _each("gemma4_text", global_head_dim=512),
    "other norms": {
        **_each("cohere", "glm4_moe", use_qk_norm=True),
        **_each("llama4_text", use_qk_norm=False),
        **_each("phi", qk_layernorm=True),
        **_each("persimmon", qk_layernorm=False),
        **_each("stablelm", qk_layernorm=True, use_qkv_bias=True, use_parallel_residual=True),
        **_each("opt", do_layer_norm_before=False),
    },
    "clipped": _each("olmo", "olmoe", clip_qkv=0.5),
    "biased": _each("afmoe", "cohere2", "gemma3_text", "llama", "qwen3", attention_bias=True),
    "softcap": _each("gemma3_text", attn_logit_softcapping=5.0, final_logit_softcapping=5.0),
    "no softcap": _each("gemma2", attn_logit_softcapping=None),
    "other scale": _each("gpt2", "gpt_bigcode", scale_attn_weights=False),
    "scaled by layer, upcast": _each("gpt2", scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "every head its keys": _each("gpt_bigcode", multi_query=False),
    "keys for values": _each("gemma4_text", attention_k_eq_v=True),
    "shared keys": _each(
        "gemma4_text",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
    ),
    "token dropout": _each("esm", token_dropout=True, mask_token_id=MASKED),
    "halves rotated": _each("deepseek_v3", "glm4_moe_lite", "youtu", rope_interleave=False),
}
VARIANTS: dict[str, tuple[str, Values]] = {
    f"{model_type}, {setting}": (model_type, values)
    for setting, each in _BY_SETTING.items()
    for model_type, values in each.items()
}
"""By name: the architecture, and the values of its config."""


def with_head(types: tuple[str, ...], head: str) -> list[str]:
    """The variants of architectures that have a head: all with their causal one; those whose mask changes without any
    head and with one that classifies tokens too, and those that have no causal head without one."""
    found = []
    for name, (model_type, _) in VARIANTS.items():
        setting = name.partition(", ")[2]
        wide = setting in ("is_causal=False", "bidirectional", "token dropout") or model_type == "mistral4"
        if model_type in types and (head == "causal" or (wide and head in ("none", "tokens"))):
            found.append(name)
    return found
