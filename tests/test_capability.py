from __future__ import annotations

import dataclasses

import pytest

from axattn.capability import Capability, Need, missing

ALL = Capability(
    devices=frozenset({"cpu"}),
    dtypes=frozenset({"float32"}),
    **{f.name: True for f in dataclasses.fields(Capability) if f.type == "bool"},
)
ASKED = {
    "window": 4,
    "chunk": 8,
    "softcap": 50.0,
    "sinks": True,
    "bias": True,
    "sparse": True,
    "dropout": 0.1,
    "dense_mask": True,
    "padding": True,
    "holes": True,
    "traced": True,
    "segments": True,
    "cross_lengths": True,
    "gradient": True,
    "weights": True,
}


def test_a_kernel_that_has_everything_lacks_nothing() -> None:
    assert (
        missing(Need(head_dim=64, heads=8, kv_heads=2, value_dim=32, dtype="float32", device="cpu", **ASKED), ALL) == []
    )


@pytest.mark.parametrize("feature", sorted(ASKED))
def test_each_feature_asked_for_and_lacking_is_one_reason(feature: str) -> None:
    lacking = dataclasses.replace(ALL, **{feature: False})
    (reason,) = missing(Need(**{feature: ASKED[feature]}), lacking, "kernel")
    assert reason.feature == feature
    assert feature in reason.text
    assert "kernel" in reason.text
    assert missing(Need(), lacking) == []


def test_every_optional_field_of_need_is_covered_by_a_feature() -> None:
    sizes = {"head_dim", "value_dim", "heads", "kv_heads", "causal", "dtype", "device"}
    assert {f.name for f in dataclasses.fields(Need)} - sizes == set(ASKED)


@pytest.mark.parametrize(
    ("change", "need", "feature"),
    [
        ({"causal": False}, Need(causal=True), "causal"),
        ({"bidirectional": False}, Need(causal=False), "causal"),
        ({"head_dims": frozenset({64, 128})}, Need(head_dim=96), "head_dim"),
        ({"max_head_dim": 256}, Need(head_dim=512), "head_dim"),
        ({"max_head_dim": 256}, Need(head_dim=128, value_dim=512), "value_dim"),
        ({"head_dim_multiple": 8}, Need(head_dim=60), "head_dim"),
        ({"value_dim_differs": False}, Need(head_dim=192, value_dim=128), "value_dim"),
        ({"grouped_heads": False}, Need(heads=8, kv_heads=2), "kv_heads"),
        ({}, Need(dtype="float64"), "dtype"),
        ({}, Need(device="cuda"), "device"),
    ],
)
def test_sizes_dtypes_and_devices(change: dict[str, object], need: Need, feature: str) -> None:
    (reason,) = missing(need, dataclasses.replace(ALL, **change))
    assert reason.feature == feature


def test_a_16_bit_kernel_says_how_to_get_16_bit() -> None:
    half = dataclasses.replace(ALL, dtypes=frozenset({"bfloat16"}))
    (reason,) = missing(Need(dtype="float32"), half)
    assert "torch.bfloat16" in reason.fix


def test_all_reasons_are_given_at_once() -> None:
    assert len(missing(Need(**ASKED), Capability(causal=True))) == len(ASKED)
