"""The families that examples are drawn from: those of the matrix, and some whose positions are read in other ways."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from tests.conformance.families import FAMILIES as MATRIX
from tests.conformance.families import SIZES
from tests.models import HYBRIDS, SMALL, amplify, build

_SMALLEST = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 97}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _of(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = cls._from_config(config) if hasattr(cls, "_from_config") else cls.from_config(config)
    amplify(model)
    return model.eval()


def _gpt2() -> Any:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _of(tf.AutoModelForCausalLM, tf.GPT2Config(**_SMALLEST, **quiet, bos_token_id=1, eos_token_id=2))


def _roberta() -> Any:
    config = tf.RobertaConfig(**SIZES, **_QUIET, num_hidden_layers=2, max_position_embeddings=256, pad_token_id=1)
    return _of(tf.RobertaModel, config)


def _dynamic() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return _of(tf.AutoModelForCausalLM, tf.LlamaConfig(**SMALL | {"max_position_embeddings": 16}, rope_parameters=rope))


def _longrope() -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 12}
    own = {"original_max_position_embeddings": 12, "sliding_window": None, "rope_parameters": rope}
    return _of(tf.AutoModelForCausalLM, tf.Phi3Config(**SMALL, **own))


MORE: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "roberta": _roberta,
    "llama, dynamic rope": _dynamic,
    "phi3, longrope": _longrope,
    "lfm2": functools.partial(build, "lfm2"),
}
LEFT_OUT = {
    "t5": "an encoder-decoder: no packed rows",
    "deepseek_v32": "its sparse indices tie, and the order of ties is rounding's",
    "gemma4": "its heads of 512 make an example ten times slower; the matrix has it",
}
FAMILIES: dict[str, Callable[[], Any]] = {
    **{name: one.make for name, one in MATRIX.items() if one.kind != "refused" and name not in LEFT_OUT},
    **MORE,
}
ENCODERS = ("bert", "modernbert", "roberta")
PLANES = {name: one.planes for name, one in MATRIX.items() if one.planes}
INNER = {"opt": "model.decoder"}
"""The inner model, where its head does not call ``base_model``."""
LENGTHS = frozenset(
    name for name in FAMILIES if name not in ("opt", "lfm2") and (name not in MATRIX or MATRIX[name].lengths)
)
"""Whose forward takes ``cu_seq_lens_*``."""
assert set(HYBRIDS) & set(FAMILIES)


@functools.cache
def made(family: str) -> Any:
    """The family's model in float32, on Transformers' own eager attention. Shared: copy it before changing it."""
    model = FAMILIES[family]()
    model.set_attn_implementation("eager")
    for inner in model.modules():
        if isinstance(inner, tf.PreTrainedModel):
            inner.config._attn_implementation = "eager"
    return model
