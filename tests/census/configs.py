"""A tiny config for any architecture that Transformers maps: its own defaults, with every size made small."""

from __future__ import annotations

from typing import Any

from tests.census.images import shrink
from tests.census.variants import VARIANTS

HEADS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "vision": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "tokens": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "AutoModelForTokenClassification"),
    "rows": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification"),
    "questions": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "AutoModelForQuestionAnswering"),
    "none": ("MODEL_MAPPING_NAMES", "AutoModel"),
}
"""The heads of the census, by Transformers' mapping and its auto class."""
FEWER = ("tokens", "rows", "questions", "none")
"""Heads that are tried on fewer names."""

_WIDTHS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "hidden_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("lru_width", "emb_dim", "attention_hidden_size", "embed_dim", "out_hidden_size"), 32),
    **dict.fromkeys(("dim", "input_embedding_size", "intra_bottleneck_size", "output_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "d_inner", "block_ff_dim", "mlp_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp"), 16),
}
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_key_value_heads", "num_hash_layers"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_groups", "num_kv_shared_layers", "num_nextn_predict_layers"), 0),
    "mamba_n_groups": 1,
    "moe_layer_start_index": 1,
}
_DIMS = {
    **dict.fromkeys(("head_dim", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size", "ssm_state_size", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "dim_head"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "swa_head_dim", "swa_v_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("index_head_dim", "index_n_heads", "block_size", "chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("index_topk", "attention_chunk_size", "rotary_dim", "conv_kernel", "global_rope_head_dim"), 4),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "attention_window_size"), 6),
    **dict.fromkeys(("keep_window_size", "local_attention_window_len", "rel_extent"), 6),
    **dict.fromkeys(("index_block_size", "log_scaling_n_floor"), 4),
    "index_topk_blocks": 2,
    "rotary_pct": 0.5,
}
_TOKENS = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "ngram_vocab_size_ratio"), 97),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"), 256),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "is_decoder": True,
}
_QUIET = {
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "activation_dropout"), 0.0),
    **dict.fromkeys(("layerdrop", "decoder_layerdrop", "encoder_layerdrop", "classifier_dropout"), 0.0),
    **dict.fromkeys(("mlp_dropout", "embedding_dropout", "dropout_rate", "residual_dropout"), 0.0),
}
SMALL: dict[str, Any] = _WIDTHS | _COUNTS | _DIMS | _TOKENS | _QUIET

_MAY_BE_NONE = {"head_dim", "num_key_value_heads", "n_group", "topk_group", "num_experts_per_tok", "n_routed_experts"}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {"partial_rotary_factor": 0.5, "mrope_section": [2, 0, 0]}
_ONE_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "esm": {"vocab_size": 97},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"window_size": 6, "attention_types": [[["global", "local"], 1]]},
    "gemma4_text": {"global_head_dim": 8},
    "glm4v_moe_text": {"rope_parameters": _MROPE["rope_parameters"] | _HALF_MROPE},
    "glm4v_text": _MROPE,
    "glm_ocr_text": _MROPE,
    "granitemoehybrid": _ONE_ATTENTION,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 97, "entity_emb_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"head_dim": 8},
    "paddleocr_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 97,
        "ple_embed_dim": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 64},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family wants besides: sizes that must agree with each other."""


ASKED_FOR = {("gemma4", "vision_config")}
"""Parts that a family has only if they are asked for."""


def tiny(model_type: str, head: str = "causal") -> Any:
    """The config of a tiny model.

    Args:
        model_type: Transformers' name of the architecture, or one of `VARIANTS`.
        head: as in `HEADS`.

    Raises:
        Exception: whatever Transformers raises where the small sizes do not fit together.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, values = VARIANTS.get(model_type, (model_type, {}))
    config = of_class(CONFIG_MAPPING[model_type], head, values)
    if head == "vision":
        shrink(config)
    return config


def of_class(cls: Any, head: str, asked: dict[str, Any] | None = None) -> Any:
    """As `tiny`, for a config class, with the values asked for."""
    default = cls()
    values = default.to_dict()
    given = {name: value for name, value in SMALL.items() if _is_field(cls, values, name)}
    if head in ("masked", "seq2seq", *FEWER):
        given.pop("is_decoder", None)
    if head in FEWER and hasattr(default, "use_cache"):
        given["use_cache"] = False
    kv, all_heads = (values.get(name) for name in ("num_key_value_heads", "num_attention_heads"))
    if kv is not None and kv == all_heads and "num_key_value_heads" in given:
        given["num_key_value_heads"] = 4
    kinds = list(dict.fromkeys(values.get("layer_types") or ()))
    if kinds and _is_field(cls, values, "layer_types"):
        count = max(2, len(kinds))
        given |= {"layer_types": (kinds * 2)[:count], "num_hidden_layers": count}
    for name in getattr(cls, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if inner is None and (cls.model_type, name) in ASKED_FOR:
            inner = cls.sub_configs[name]()
        if inner is not None and name not in OVERRIDES.get(cls.model_type, {}):
            given[name] = of_class(type(inner), head)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if "mrope_section" in rope:
        half = int(8 * rope.get("partial_rotary_factor", 1.0)) // 2
        given["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    given |= OVERRIDES.get(cls.model_type, {}) | (asked or {})
    return cls(**{name: value for name, value in given.items() if value is not ...})


def _is_field(cls: Any, values: dict[str, Any], name: str) -> bool:
    """Whether a config takes a value: a field of its own, not a property, and not one that is None by default."""
    if isinstance(getattr(cls, name, None), property) or name in getattr(cls, "attribute_map", {}):
        return False
    present = any(name in getattr(base, "__annotations__", {}) for base in cls.__mro__)
    return present and (values.get(name) is not None or name in _MAY_BE_NONE or name.endswith("token_id"))
