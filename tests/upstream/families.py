"""The families that Transformers' mixins are run on: a tiny config, and an input for its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.conformance.families import FAMILIES as CONFORMANCE
from tests.models import CONFIGS

Inputs = Callable[[Any], dict[str, torch.Tensor]]
HEADS = (
    "MODEL_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
)
"""Transformers' mappings from configs to classes."""
SEQ2SEQ = ("MODEL_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING")
"""Those of T5 that take any ids: its other heads want an end token in every row."""
BATCH, LENGTH = 5, 7


@dataclass(frozen=True)
class Upstream:
    """What a tester of a family is made of.

    Attributes:
        config: makes a tiny config.
        inputs: what one forward gets.
        heads: the classes that are tried.
        composite: Transformers' tests take the model for one made of several.
        encoder_decoder: they take it for one.
    """

    config: Callable[[], Any]
    inputs: Inputs
    heads: tuple[str, ...] = HEADS
    composite: bool = False
    encoder_decoder: bool = False


def _text(config: Any) -> dict[str, torch.Tensor]:
    """Rows of random ids, padded on the right up to one token a row, as Transformers' testers give them."""
    ids = torch.randint(3, 90, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids), LENGTH - BATCH)}


def _both(config: Any) -> dict[str, torch.Tensor]:
    text = _text(config)
    decoder = {f"decoder_{name}": value for name, value in _text(config).items()}
    return text | decoder


def _images(config: Any) -> dict[str, torch.Tensor]:
    """One image of 8 x 8 patches in each row."""
    start, end = config.vision_start_token_id, config.vision_end_token_id
    row = torch.tensor([[5, 6, start, *[config.image_token_id] * 16, end, 7, 8, 9]])
    ids = row.expand(BATCH, -1).clone()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(BATCH * 64, 96),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * BATCH),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }


def _decoder(name: str) -> Upstream:
    return Upstream(CONFIGS[name], _text)


def _qwen2_5_vl() -> Any:
    config = CONFORMANCE["qwen2_5_vl"].make().config
    config.image_token_id, config.video_token_id = 20, 21  # within the vocabularies that tests shrink
    config.vision_start_token_id, config.vision_end_token_id = 22, 23
    return config


def _of_conformance(name: str, inputs: Inputs, **kwargs: Any) -> Upstream:
    return Upstream(lambda: CONFORMANCE[name].make().config, inputs, **kwargs)


FAMILIES: dict[str, Upstream] = {
    **{
        name: _decoder(name)
        for name in ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "phi3", "opt", "mixtral")
    },
    "bert": _of_conformance("bert", _text),
    "modernbert": _of_conformance("modernbert", _text),
    "t5": _of_conformance("t5", _both, heads=SEQ2SEQ, encoder_decoder=True),
    "qwen2_5_vl": Upstream(_qwen2_5_vl, _images, composite=True),
}
