"""Transformers' mixins on tiny families. Collected only by name, with its tests on the path (`sources.py`)."""

from __future__ import annotations

import os
import unittest
from typing import Any

import transformers
from transformers_tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from tests.upstream.families import BATCH, FAMILIES, Upstream
from tests.upstream.generation import GenerationBesideEager

INITIAL = 0.2
"""The deviation of initial weights: at Transformers' 0.02 scores are so flat that wrong ones are within tolerances."""


class Tester:
    """What Transformers' mixins ask of a model's tester."""

    batch_size, is_training = BATCH, True

    def __init__(self, family: Upstream) -> None:
        self.family = family
        config = family.config()
        text = config.get_text_config()
        self.hidden_size, self.num_hidden_layers = text.hidden_size, text.num_hidden_layers
        self.num_attention_heads, self.vocab_size = text.num_attention_heads, text.vocab_size
        self.seq_length = family.inputs(config)["input_ids"].shape[1]
        self.causal_lm_class = _class(config, "MODEL_FOR_CAUSAL_LM_MAPPING")

    def get_config(self) -> Any:
        config = self.family.config()
        config._attn_implementation = None
        config.initializer_range = INITIAL
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config = self.get_config()
        return config, self.family.inputs(config)


def _class(config: Any, mapping: str) -> type | None:
    found: type | None = getattr(transformers, mapping).get(type(config), None)
    return found


def _classes(family: Upstream) -> tuple[type, ...]:
    config = family.config()
    found = [cls for name in family.heads if (cls := _class(config, name)) is not None]
    flat = [cls for each in found for cls in (each if isinstance(each, tuple | list) else [each])]
    return tuple(dict.fromkeys(flat))


def _test_class(name: str, family: Upstream) -> type:
    def set_up(self: Any) -> None:
        self.model_tester = Tester(family)

    body = {
        "setUp": set_up,
        "all_model_classes": _classes(family),
        "_is_composite": family.composite,
        "is_encoder_decoder": family.encoder_decoder,
        "model_tester": None,
        "__module__": __name__,
    }
    mixins = (ModelTesterMixin, GenerationTesterMixin, GenerationBesideEager, TrainingTesterMixin, unittest.TestCase)
    return type(f"{name}_test", mixins, body)


NAME = os.environ["AXATTN_UPSTREAM_FAMILY"]
globals()[f"{NAME}_test"] = _test_class(NAME, FAMILIES[NAME])
