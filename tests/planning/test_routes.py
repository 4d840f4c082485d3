from __future__ import annotations

import pickle

import pytest

from axattn import backends
from axattn.errors import UnsupportedAttentionError
from axattn.planning.routes import Route, candidates
from axattn.spec.capability import Need
from tests.environments import CPU


def test_a_name_the_user_typed_stands_alone_unless_routing_is_asked_for() -> None:
    assert candidates("varlen", "raise", CPU) == ("varlen",)
    assert candidates("s2", "route", CPU) == ("s2", "varlen", "sdpa", "eager")
    assert candidates("sdpa", "route", CPU) == ("sdpa", "varlen", "eager")
    assert candidates("auto", "raise", CPU) is candidates("auto", "route", CPU)


def test_the_first_candidate_that_serves_is_chosen() -> None:
    route = Route("auto", "layer", candidates("auto", "route", CPU), "varlen")
    assert route.choose(Need(dtype="float32", device="cpu")).name == "varlen"
    assert route.choose(Need(bias=True)).name == "sdpa"
    assert route.choose(Need(softcap=1.0)).name == "eager"


def test_an_fp32_call_of_a_16_bit_kernel_is_refused_with_the_way_out() -> None:
    route = Route("sage", "layer", ("sage",), "sage")
    with pytest.raises(UnsupportedAttentionError, match=r"To fix it: dtype=torch\.bfloat16, or bf16 autocast"):
        route.choose(Need(head_dim=64, dtype="float32", device="cuda"))


def test_when_nothing_serves_every_candidates_reasons_are_given() -> None:
    route = Route("auto", "layer", ("varlen", "sdpa"), "varlen")
    with pytest.raises(UnsupportedAttentionError) as caught:
        route.choose(Need(softcap=1.0, weights=True))
    assert len(caught.value.reasons) == 4


def test_a_route_pickles_without_its_memo() -> None:
    route = Route("auto", "layer", ("varlen",), "varlen", served={"varlen": 3}, decisions={1: backends.get("varlen")})
    other = pickle.loads(pickle.dumps(route))
    assert (other.served, other.decisions) == ({"varlen": 3}, {})
