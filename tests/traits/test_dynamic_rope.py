"""Rotary embeddings that follow the longest position: a document in a packed row has the frequencies it has alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import axattn
from axattn.traits import dynamic_rope
from tests.models import alone, build, positions, tokens
from tests.sampling import part_of

LIMIT = 6
LENGTHS = (9, 4, 6, 5)
"""Documents on both sides of `LIMIT`, and one at it."""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": LIMIT,
    "factor": 8.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def long(family: str = "llama", **sizes: int) -> Any:
    """A tiny model under LongRoPE; its heads have 8 channels, so 4 frequencies."""
    model = build(family, head_dim=8, rope_parameters=LONGROPE, **sizes)
    assert dynamic_rope.limits(model) == [LIMIT]
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "varlen", "eager", "sdpa"])
@pytest.mark.parametrize("lengths", [LENGTHS, (4, 5, 3), (9, 8)], ids=["both", "short", "long"])
def test_documents_have_the_factors_that_they_have_alone(name: str, lengths: tuple[int, ...]) -> None:
    model = long()
    ids = tokens(1, sum(lengths))
    expected = alone(model, ids, lengths)
    axattn.apply(model, name)
    found = model(input_ids=ids, position_ids=positions(lengths), use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)
    axattn.restore(model)
    whole = model(input_ids=ids, position_ids=positions(lengths), use_cache=False).logits
    assert torch.allclose(whole, expected, atol=1e-5) is (len({length > LIMIT for length in lengths}) == 1), "no hook"


@torch.no_grad()
def test_padding_after_a_document_does_not_make_it_long() -> None:
    model = long()
    ids, mask = tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[:, 14:] = 0
    rows = torch.cat([positions((9, 5)), torch.arange(5, 11)[None]], -1)  # padding goes on from the last document
    expected = alone(model, ids[:, :14], (9, 5))
    axattn.apply(model, "auto")
    found = model(input_ids=ids, position_ids=rows, attention_mask=mask, use_cache=False).logits[:, :14]
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("starts", "rope", "compiled"),
    part_of(
        itertools.product(("low", "second high", "first high"), ("longrope", "dynamic"), (False, True)),
        kept=itertools.product(("low", "second high", "first high"), ("longrope", "dynamic"), (False,)),
    ),
)
def test_what_counts_is_the_highest_position_of_a_document(starts: str, rope: str, compiled: bool) -> None:
    """Documents of few tokens that do not start at 0."""
    torch._dynamo.reset()
    parameters = {"longrope": LONGROPE, "dynamic": DYNAMIC}[rope]
    first = {"low": (0, 1), "second high": (1, 20), "first high": (30, 0)}[starts]
    one = {"num_hidden_layers": 1, "max_position_embeddings": LIMIT}
    model = build("llama", head_dim=8, rope_parameters=parameters, **one)
    ids, where = tokens(1, 5), [torch.arange(start, start + n)[None] for start, n in zip(first, (3, 2), strict=True)]
    given = zip(ids.split((3, 2), 1), where, strict=True)
    expected = torch.cat([model(part, position_ids=at, use_cache=False).logits for part, at in given], 1)
    axattn.apply(model, "auto")
    run = torch.compile(model, backend="eager") if compiled else model
    if parameters is DYNAMIC and max(first) > 1:
        with pytest.raises((axattn.UnsupportedAttentionError, RuntimeError), match="positions above 5"):
            run(ids, position_ids=torch.cat(where, 1), use_cache=False)
        return
    assert torch.allclose(run(ids, position_ids=torch.cat(where, 1), use_cache=False).logits, expected, atol=1e-5)


def test_gradients_and_checkpointing() -> None:
    model = long()
    ids = tokens(1, sum(LENGTHS))
    for part in ids.split(LENGTHS, 1):
        model(input_ids=part, use_cache=False).logits.square().sum().backward()
    table = model.get_input_embeddings().weight
    expected, table.grad = table.grad, None
    axattn.apply(model, "auto").train()
    model.gradient_checkpointing_enable()
    model(input_ids=ids, position_ids=positions(LENGTHS), use_cache=False).logits.square().sum().backward()
    assert torch.allclose(table.grad, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_in_a_compiled_graph() -> None:
    model = long(num_hidden_layers=1)
    expected = {lengths: alone(model, tokens(1, sum(lengths)), lengths) for lengths in (LENGTHS, (3, 5, 4, 12))}
    axattn.apply(model, "varlen")
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for lengths, wanted in expected.items():
        found = compiled(input_ids=tokens(1, sum(lengths)), position_ids=positions(lengths), use_cache=False).logits
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="5.17 can't run such a config at all")
@torch.no_grad()
def test_layers_of_two_kinds_with_one_longrope() -> None:
    each = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LONGROPE}
    model = build("gemma3", head_dim=8, rope_parameters=each)
    assert dynamic_rope.limits(model) == [LIMIT]
    ids = tokens(1, sum(LENGTHS))
    expected = alone(model, ids, LENGTHS)
    axattn.apply(model, "auto")
    found = model(input_ids=ids, position_ids=positions(LENGTHS), use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("real", [4, 7], ids=["only the padding is long", "long"])
def test_unpadded_rows_equal_the_padded_batch_whose_longest_row_decides(side: str, real: int) -> None:
    model = long()
    ids, mask = tokens(3, 9), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate((real, 3, 2)):
        mask[row, slice(0, length) if side == "right" else slice(9 - length, 9)] = 1
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    axattn.apply(model, "auto", unpad=True)
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_dynamic_ntk_depends_on_the_longest_document_and_is_refused(name: str) -> None:
    model = build("llama", rope_parameters=DYNAMIC, max_position_embeddings=LIMIT, num_hidden_layers=1)
    short = (5, 6, 3)
    expected = alone(model, tokens(1, sum(short)), short)
    axattn.apply(model, name)
    found = model(input_ids=tokens(1, sum(short)), position_ids=positions(short), use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)
    given = {"input_ids": tokens(1, sum(LENGTHS)), "position_ids": positions(LENGTHS), "use_cache": False}
    with pytest.raises(axattn.UnsupportedAttentionError, match="longest document, of 9 tokens"):
        model(**given)
    with pytest.raises(RuntimeError, match="packed rows would leak here"):
        torch.compile(model, backend="eager")(**given)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 2])
def test_unpadded_rows_are_stretched_as_far_as_the_padded_batch(start: int) -> None:
    """Padding after the longest row counts there."""
    model = build("llama", rope_parameters=DYNAMIC, max_position_embeddings=LIMIT)
    ids, mask = tokens(2, 16), torch.zeros(2, 16, dtype=torch.long)
    mask[0, start : start + 10], mask[1, start : start + 4] = 1, 1
    stock = copy.deepcopy(model)  # the embedding remembers the longest row that it has met
    expected = stock(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    axattn.apply(model, "auto", unpad=True)
    assert torch.allclose(model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected, atol=1e-5)


@torch.no_grad()
def test_padding_after_a_short_document_stretches_nothing() -> None:
    model = build("llama", rope_parameters=DYNAMIC, max_position_embeddings=LIMIT)
    ids, document_ids = tokens(1, 18), torch.tensor([[1] * 5 + [2] * 4 + [0] * 9])
    expected = alone(model, ids[:, :9], (5, 4))
    axattn.apply(model, "auto")
    assert torch.allclose(model(ids, attention_mask=document_ids, use_cache=False).logits[:, :9], expected, atol=1e-5)


def test_what_a_config_asks_for() -> None:
    assert dynamic_rope.by_length(long().config) == ["longrope"]
    assert dynamic_rope.by_length(build("llama", rope_parameters=DYNAMIC).config) == ["dynamic"]
    assert dynamic_rope.by_length(build("llama").config) == []
    assert dynamic_rope.rope_scaling_threshold(long()) is None
    assert dynamic_rope.rope_scaling_threshold(build("llama", rope_parameters=DYNAMIC, max_position_embeddings=9)) == 9
