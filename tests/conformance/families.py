"""The model families of the matrix: tiny, seeded, with weights large enough that attention decides the output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf

from tests.models import CONFIGS, LAYERS, REFUSED, SMALL, amplify, build

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision", "refused"]
IMAGE = 90  # the image token of the vision families
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: as in the table.
        kind: which scenarios apply.
        make: builds the model; keywords go to its config.
        features: what its attention has beyond plain causal attention.
        lengths: its forward takes ``cu_seq_lens_*``.
        dropout: the config's name for attention dropout, "" when it has none of its own.
        planes: leading planes of its ``position_ids``, 0 for plain ``[B, S]``.
        experts: tokens of all documents pass through the same matrix products, whose rounding then depends on them.
    """

    name: str
    kind: Kind
    make: Callable[..., Any]
    features: frozenset[str] = frozenset()
    lengths: bool = True
    dropout: str = "attention_dropout"
    planes: int = 0
    experts: bool = False


def _of(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = cls(config) if issubclass(cls, tf.PreTrainedModel) else cls.from_config(config)
    amplify(model)
    return model.eval()


def _bert(**given: Any) -> Any:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _of(tf.BertModel, tf.BertConfig(num_hidden_layers=2, **{**SIZES, **quiet, **given}))


def _modernbert(**given: Any) -> Any:
    special = {**SPECIAL, "cls_token_id": 1, "sep_token_id": 2}
    config = tf.ModernBertConfig(**{**SIZES, **special, "num_hidden_layers": 3, "local_attention": 6, **given})
    return _of(tf.ModernBertModel, config)


def _t5(**given: Any) -> Any:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(**{**sizes, "decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0, **given})
    model = _of(tf.T5ForConditionalGeneration, config)
    for name, parameter in model.named_parameters():
        if "relative" in name:
            parameter.data.normal_(std=3.0)
    return model


def _gemma4(**given: Any) -> Any:
    own = {
        "head_dim": 8,
        "global_head_dim": 512,
        "sliding_window": 5,
        "layer_types": LAYERS * 2,
        "num_hidden_layers": 4,
    }
    own |= {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
    config = tf.Gemma4TextConfig(**{**SMALL, **own, **given})
    model = _of(tf.AutoModelForCausalLM, config)
    for name, parameter in model.named_parameters():
        if "q_norm" in name:
            parameter.data.mul_(0.2)  # unscaled logits of 512 dims are so sharp that rounding would decide
    return model


def _deepseek_v32(**given: Any) -> Any:
    own = {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    own |= {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 16}
    own |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "index_topk": 4, "index_head_dim": 16}
    # many index heads: their scores pass a ReLU, and keys that tie at zero are picked in no fixed order
    config = tf.DeepseekV32Config(**{**SMALL, **own, "index_n_heads": 16, **given})
    return _of(tf.AutoModelForCausalLM, config)


def _qwen3_next(**given: Any) -> Any:
    own = {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2}
    own |= {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    own |= {f"linear_{side}_head_dim": 8 for side in ("key", "value")}
    own |= {f"linear_num_{side}_heads": 2 for side in ("key", "value")}
    return _of(tf.AutoModelForCausalLM, tf.Qwen3NextConfig(**{**SMALL, **own, **given}))


def _qwen2_5_vl(**given: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "in_channels": 3, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "out_hidden_size": 32}
    config = tf.Qwen2_5_VLConfig(
        text_config={**SMALL, "rope_parameters": rope, **given},
        vision_config={**vision, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return _of(tf.Qwen2_5_VLForConditionalGeneration, config)


def _gemma3_vl(**given: Any) -> Any:
    text = {**SMALL, "head_dim": 8, "sliding_window": 5, "layer_types": LAYERS, **given}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 16, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return _of(tf.Gemma3ForConditionalGeneration, config)


_FEATURES = {
    "llama": {"grouped heads"},
    "qwen3": {"grouped heads"},
    "mistral": {"window", "grouped heads"},
    "mixtral": {"grouped heads"},
    "granite": {"scale", "grouped heads"},
    "phi3": {"grouped heads"},
    "olmo2": {"grouped heads"},
    "gemma2": {"window", "softcap", "scale", "grouped heads"},
    "gemma3": {"window", "grouped heads"},
    "gpt_oss": {"window", "sinks", "grouped heads"},
    "deepseek_v3": {"value dim"},
    "llama4": {"chunk", "grouped heads"},
    "opt": set(),
}
_EXPERTS = ("mixtral", "gpt_oss", "deepseek_v3", "llama4")


def _decoders() -> list[Family]:
    return [
        Family(
            name,
            "decoder",
            functools.partial(build, name),
            frozenset(_FEATURES[name]),
            lengths=name != "opt",
            experts=name in _EXPERTS,
        )
        for name in CONFIGS
    ]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *_decoders(),
        Family("gemma4", "decoder", _gemma4, frozenset({"window", "two head dims", "shared keys", "grouped heads"})),
        Family("deepseek_v32", "decoder", _deepseek_v32, frozenset({"sparse", "value dim"}), experts=True),
        Family("qwen3_next", "decoder", _qwen3_next, frozenset({"grouped heads"}), experts=True),
        Family("bert", "encoder", _bert, frozenset({"bidirectional"}), dropout="attention_probs_dropout_prob"),
        Family("modernbert", "encoder", _modernbert, frozenset({"bidirectional", "window"})),
        Family("t5", "encoder-decoder", _t5, frozenset({"bias", "bidirectional"}), lengths=False, dropout=""),
        Family("qwen2_5_vl", "vision", _qwen2_5_vl, frozenset({"grouped heads"}), planes=4),
        Family("gemma3_vl", "vision", _gemma3_vl, frozenset({"window", "image blocks", "grouped heads"})),
        *(Family(name, "refused", functools.partial(build, name)) for name in REFUSED),
    )
}
