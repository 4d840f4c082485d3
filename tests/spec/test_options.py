from __future__ import annotations

from typing import Any

import pytest

import axattn
from axattn.errors import InvalidConfigError
from axattn.spec.options import Option, one_of, require_options
from tests.models import build

SIZE = Option("size", 1, "how big", one_of(1, 2, None))


def test_what_a_kernel_offers_is_taken() -> None:
    require_options({"size": 2}, {"a": (SIZE,), "b": ()})
    require_options({"size": None}, {"a": (SIZE,)})
    require_options({}, {})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"sise": 2}, "a has no option 'sise'. Options: a: size \\(how big\\)"),
        ({"size": 3}, "size=3 is not one of 1, 2, None"),
        ([("size", 2)], "must be a dict, not list"),
    ],
)
def test_anything_else_is_refused_with_what_there_is(given: Any, text: str) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        require_options(given, {"a": (SIZE,)})


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(InvalidConfigError) as raised:
        require_options({"size": 3, "other": 1}, {"a": (SIZE,)})
    assert len(raised.value.reasons) == 2


@pytest.mark.parametrize("name", ["auto", "varlen", "sdpa", {"": "eager"}])
def test_kernels_without_options_refuse_them(name: Any) -> None:
    with pytest.raises(InvalidConfigError, match="no options"):
        axattn.plan(build("llama"), name, kernel_options={"group_size": 4})


def test_options_come_back_after_using() -> None:
    model = axattn.apply(build("llama"), "s2", kernel_options={"group_size": 8})
    with axattn.using(model, "s2", kernel_options={"group_size": 4}):
        assert _of(model) == {"group_size": 4}
    assert _of(model) == {"group_size": 8}
    assert axattn.plan(model, "s2", kernel_options={"group_size": 8}).to_dict()["options"] == {"group_size": 8}


def _of(model: Any) -> Any:
    return model.model.layers[0].self_attn._axattn_route.options
