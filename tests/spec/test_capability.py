from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from axattn.spec.capability import Capability, Need, Refused, missing

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
    "non_contiguous_padding": True,
    "traced": True,
    "segments": True,
    "stems": True,
    "cross_lengths": True,
    "gradient": True,
    "deterministic": True,
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


HALF_WINDOW = Refused("has no such kernel", ("window", "gradient"), dtypes=frozenset({"float32"}), head_dims=(65, 256))


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, False),
        ({"window": None}, True),
        ({"gradient": False}, True),
        ({"dtype": "bfloat16"}, True),
        ({"dtype": None}, True),
        ({"head_dim": 64}, True),
        ({"head_dim": 256}, False),
        ({"head_dim": 257}, True),
        ({"head_dim": None}, True),
    ],
)
def test_a_combination_is_refused_where_all_of_it_is_asked_for(change: dict[str, Any], served: bool) -> None:
    kernel = dataclasses.replace(ALL, dtypes=frozenset({"float32", "bfloat16"}), refuses=(HALF_WINDOW,))
    need = dataclasses.replace(Need(head_dim=128, window=4, gradient=True, dtype="float32"), **change)
    reasons = missing(need, kernel, "kernel")
    assert (reasons == []) is served
    if not served:
        assert [r.text for r in reasons] == [
            f"window in training, float32, head_dim={need.head_dim} (kernel has no such kernel)"
        ]


@pytest.mark.parametrize(
    ("asks", "need"),
    [
        ("bidirectional", Need(causal=False)),
        ("causal", Need()),
        ("grouped_heads", Need(heads=8, kv_heads=2)),
        ("value_dim_differs", Need(head_dim=192, value_dim=128)),
        *((flag, Need(**{flag: value})) for flag, value in ASKED.items()),
    ],
)
def test_a_combination_names_any_feature_of_a_record(asks: str, need: Need) -> None:
    kernel = dataclasses.replace(ALL, refuses=(Refused("can't", (asks,)),))
    (reason,) = missing(need, kernel)
    assert reason.feature == asks
    assert missing(dataclasses.replace(Need(head_dim=64), causal=asks != "causal"), kernel) == []
    assert hash(kernel) != hash(ALL)


def test_head_dims_are_those_of_the_wider_heads() -> None:
    wide = Refused("has no room", head_dims=(193, 256))
    assert wide.meets(Need(head_dim=256))
    assert wide.meets(Need(head_dim=64, value_dim=256))
    assert wide.meets(Need(head_dim=256, value_dim=128))
    assert not wide.meets(Need(head_dim=192, value_dim=128))
    assert wide.together() == "head_dim 193 to 256"
    endless = Refused("has no room", head_dims=(257, None))
    assert endless.meets(Need(head_dim=512))
    assert not endless.meets(Need(head_dim=256))
    assert endless.together() == "head_dim 257 and more"
