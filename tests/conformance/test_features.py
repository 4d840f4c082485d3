"""Each feature of each family decides its output: dropping one moves it by far more than the matrix tolerates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance.cases import image_inputs
from tests.conformance.families import FAMILIES
from tests.models import tokens

FAR = 1e-3  # a hundred times the tolerance
DROPPED: dict[str, Any] = {
    # feature: how to take it out of a model on eager
    "window": lambda model: _set(model, sliding_window=4096, local_attention=4096),
    "chunk": lambda model: _set(model, attention_chunk_size=4096),
    "softcap": lambda model: _set(model, attn_logit_softcapping=None, softcap=None),
    "sinks": lambda model: [p.data.fill_(-1e4) for n, p in model.named_parameters() if "sinks" in n],
    "scale": lambda model: [setattr(m, "scaling", 0.3 * m.scaling) for m in model.modules() if hasattr(m, "scaling")],
    "bias": lambda model: [p.data.zero_() for n, p in model.named_parameters() if "relative" in n],
    "sparse": lambda model: [setattr(m, "index_topk", 10_000) for m in model.modules() if hasattr(m, "index_topk")],
}
STRUCTURE = {"grouped heads", "value dim", "two head dims", "shared keys", "bidirectional", "image blocks"}
"""Not a switch: a kernel without these raises on the shapes, or a test below shows them."""


def _set(model: Any, **values: Any) -> None:
    """Set attributes wherever a module or its config has them as a number."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in values.items():
                if isinstance(getattr(holder, name, None), int | float):
                    setattr(holder, name, value)


def outputs(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(ids, **inputs)[0]


@pytest.mark.parametrize(
    ("family", "feature"),
    [(f.name, feature) for f in FAMILIES.values() for feature in sorted(f.features - STRUCTURE)],
)
def test_dropping_a_feature_moves_the_output_far_beyond_the_tolerance(family: str, feature: str) -> None:
    ids = tokens(1, 40)
    model, without = FAMILIES[family].make(), FAMILIES[family].make()
    DROPPED[feature](without)
    a, b = outputs(model, ids), outputs(without, ids)
    assert ((a - b).norm() / a.norm()).item() > FAR


@pytest.mark.parametrize("family", [f.name for f in FAMILIES.values() if f.kind in ("decoder", "vision", "encoder")])
def test_what_the_other_tokens_are_decides_the_output(family: str) -> None:
    """Attention matters at all: another first token moves the last position."""
    ids = tokens(1, 4)
    changed = ids.clone()
    changed[0, 0] = 3 + (changed[0, 0] - 2) % 94
    model = FAMILIES[family].make()
    a, b = outputs(model, ids)[0, -1], outputs(model, changed)[0, -1]
    assert ((a - b).norm() / a.norm()).item() > FAR


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_later_tokens_decide_the_output_of_encoders(family: str) -> None:
    ids = tokens(1, 4)
    changed = ids.clone()
    changed[0, -1] = 3 + (changed[0, -1] - 2) % 94
    model = FAMILIES[family].make()
    a, b = outputs(model, ids)[0, 0], outputs(model, changed)[0, 0]
    assert ((a - b).norm() / a.norm()).item() > FAR


def test_image_blocks_decide_the_output() -> None:
    model = FAMILIES["gemma3_vl"].make()
    ids, inputs = image_inputs(FAMILIES["gemma3_vl"])
    a = outputs(model, ids, **inputs)
    b = outputs(model, ids, **{**inputs, "token_type_ids": torch.zeros_like(ids)})
    assert ((a - b).norm() / a.norm()).item() > FAR


@pytest.mark.parametrize("name", sorted({feature for f in FAMILIES.values() for feature in f.features}))
def test_every_feature_is_shown_by_a_test_here(name: str) -> None:
    assert name in DROPPED or name in STRUCTURE
