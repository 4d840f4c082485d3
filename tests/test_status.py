"""What `axattn.status` says has served: the kernel that ran, also where the one that was chosen passed a call on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import axattn
from axattn.attention.interface import attend
from axattn.backends.call import AttentionCall
from axattn.backends.varlen import varlen
from axattn.documents.boundaries import Segments
from axattn.masks.mask_interface import lazy_mask
from axattn.planning.routes import ATTRIBUTE, Route
from tests.fakes.machine import hopper
from tests.models import build, positions, tokens
from tests.sampling import part_of

CPU = torch.device("cpu")


class Attention(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def served(name: str, mask: Any, *, queries: int = 6, train: bool = False, **kwargs: Any) -> dict[str, int]:
    """What one call on a module counts as."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8) for heads, n in ((4, queries), (2, 6), (2, 6)))
    module = Attention().train(train)
    route = module.__dict__[ATTRIBUTE] = Route(name, "layer", (name,), name)
    attend(name, module, q, k, v, mask, **kwargs)
    return route.served


def padded(*real: list[int]) -> Any:
    return lazy_mask(2, 6, 6, attention_mask=torch.tensor(real, dtype=torch.bool))


def test_varlen_counts_what_it_computes_itself() -> None:
    packed = lazy_mask(2, 6, 6).with_segments(Segments(((0, 2, 6), (0, 6)), CPU))
    for mask in (None, lazy_mask(2, 6, 6), packed, padded([1] * 6, [0, 0, 1, 1, 1, 1])):
        assert served("varlen", mask) == {"varlen": 1}
    assert served("varlen", lazy_mask(2, 1, 6, q_offset=5), queries=1) == {"varlen": 1}


def test_varlen_counts_dense_masks_and_dropout_as_sdpa() -> None:
    lower = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    for mask in (lower, padded([1] * 6, [1, 0, 1, 1, 1, 1])):
        assert served("varlen", mask) == {"sdpa": 1}
    assert served("varlen", None, sliding_window=2) == {"sdpa": 1}
    assert served("varlen", lazy_mask(2, 6, 6), dropout=0.5) == {"sdpa": 1}


def test_s2_counts_full_attention_as_what_computes_it() -> None:
    assert served("s2", lazy_mask(2, 6, 6), train=True) == {"s2": 1}
    assert served("s2", lazy_mask(2, 6, 6)) == {"varlen": 1}
    assert served("s2", lazy_mask(2, 1, 6, q_offset=5), queries=1, train=True) == {"varlen": 1}


@torch.no_grad()
@pytest.mark.parametrize(("family", "decodes_on"), [("llama", "varlen"), ("gemma2", "eager")])
def test_decoding_is_counted_where_it_runs(family: str, decodes_on: str) -> None:
    with hopper("sage"):
        model = axattn.apply(build(family), "sage")
        model.generate(tokens(1, 6), max_new_tokens=4, do_sample=False)
        assert [layer.served for layer in axattn.status(model).layers] == [{"sage": 1, decodes_on: 3}] * 2


def test_a_model_shows_both_kernels_at_a_glance() -> None:
    model = axattn.apply(build("llama", attention_dropout=0.1), "varlen")
    for _ in range(2):
        model(tokens(1, 9), position_ids=positions((4, 5)), use_cache=False)
    model.train()(tokens(1, 9), position_ids=positions((4, 5)), use_cache=False)
    assert "planned varlen; served varlen 2, sdpa 1\n" in str(axattn.status(model))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "given", "kernel"),
    part_of(
        [("varlen", {}, "varlen"), ("varlen", {"attention_dropout": 0.1}, "sdpa"), ("s2", {}, "varlen")],
        kept=[("varlen", {"attention_dropout": 0.1}, "sdpa"), ("s2", {}, "varlen")],
    ),
)
def test_a_graph_names_the_kernel_inside(name: str, given: dict[str, float], kernel: str) -> None:
    torch._dynamo.reset()
    model = axattn.apply(build("llama", num_hidden_layers=1, **given), name).train(bool(given))
    torch.compile(model, backend="eager")(tokens(1, 9), use_cache=False)
    (layer,) = axattn.status(model).layers
    assert (layer.compiled, layer.served) == (kernel, {})


def test_packed_rows_that_flash_does_not_take_are_counted_as_sdpa() -> None:
    """float32 on a GPU; "meta" stands for a device that is no CPU."""
    q, k, v = (torch.empty(2, heads, 6, 8, device="meta") for heads in (4, 2, 2))
    mask = lazy_mask(2, 6, 6, device="meta").with_segments(Segments(((0, 2, 6), (0, 6)), q.device))
    call = AttentionCall(Attention(), q, k, v, mask, True, None, 1.0, 0.0, None, None, None, {})
    varlen(call)
    assert call.ran == "sdpa"
