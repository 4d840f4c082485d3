"""A cache that a row of several documents has filled is known as one whatever is done to it, until it is empty."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import InvalidInputError
from axattn.hf.caches import PackedKeys, is_packed
from axattn.hf.forward_inputs import cache_keyword
from tests.models import build, positions, tokens

LENGTHS = (8, 5)
NEXT = torch.tensor([[5]])


def filled(family: str = "llama", cache: Any = None) -> tuple[Any, Any]:
    """A model, and a cache that two documents in a row have filled."""
    model = axattn.apply(build(family), "auto")
    cache = tf.DynamicCache(config=model.config) if cache is None else cache
    where = positions(LENGTHS)
    model.base_model(tokens(1, 13), position_ids=where, use_cache=True, **{cache_keyword(model): cache})
    return model, cache


def decode(model: Any, cache: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens(1, 1), position_ids=NEXT, **{cache_keyword(model): cache}).logits
    return found


def by_update(cache: Any, change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Any:
    new = tf.DynamicCache()
    for index, layer in enumerate(cache.layers):
        new.update(change(layer.keys), change(layer.values), index)
    return new


def of_layers(cache: Any) -> Any:
    new = tf.DynamicCache()
    new.layers = list(cache.layers)
    return new


def of_keys(cache: Any) -> Any:
    new = copy.deepcopy(by_update(cache))
    for layer, old in zip(new.layers, cache.layers, strict=True):
        layer.keys, layer.values = old.keys, old.values
    return new


def changed(method: str, *args: Any) -> Callable[[Any], Any]:
    def change(cache: Any) -> Any:
        getattr(cache, method)(*args)
        return cache

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "layers": of_layers,
    "keys": of_keys,
    "update": by_update,
    "update with clones": lambda cache: by_update(cache, torch.clone),
    "update with the first row": lambda cache: by_update(cache, lambda x: x[:1]),
    "update in bf16 and back": lambda cache: by_update(cache, lambda x: x.bfloat16().cpu().float().contiguous()),
    "tuples": lambda cache: tf.DynamicCache([(layer.keys, layer.values) for layer in cache.layers]),
    "iterated": lambda cache: tf.DynamicCache(list(cache)),
    "reorder": changed("reorder_cache", torch.tensor([0])),
    "select": changed("batch_select_indices", torch.tensor([0])),
    "repeat": changed("batch_repeat_interleave", 1),
    "crop": changed("crop", -1),
}


@pytest.mark.parametrize(("family", "change"), [*(("llama", change) for change in CHANGES), ("gemma3", "tuples")])
@torch.no_grad()
def test_no_change_of_a_packed_cache_hides_what_it_is(family: str, change: str) -> None:
    model, cache = filled(family)
    with pytest.raises(InvalidInputError, match="filled by a row of several documents"):
        decode(model, CHANGES[change](cache))


@pytest.mark.parametrize("given", [True, False], ids=["given", "returned"])
@torch.no_grad()
def test_a_base_model_that_returns_a_tuple_marks_its_cache(given: bool) -> None:
    model = axattn.apply(build("llama"), "auto")
    cache = tf.DynamicCache()
    word = {cache_keyword(model): cache} if given else {}
    where = positions(LENGTHS)
    output = model.model(tokens(1, 13), position_ids=where, use_cache=True, return_dict=False, **word)
    with pytest.raises(InvalidInputError, match="filled by a row of several documents"):
        decode(model, cache if given else next(x for x in output if isinstance(x, tf.Cache)))


@pytest.mark.parametrize(("kind", "how"), [("dynamic", "reset"), ("dynamic", "crop"), ("static", "reset")])
@torch.no_grad()
def test_an_emptied_cache_is_a_new_one(kind: str, how: str) -> None:
    config = build("llama").config
    given = tf.StaticCache(config=config, max_cache_len=24) if kind == "static" else None
    model, cache = filled(cache=given)
    assert is_packed(cache)
    if how == "reset":
        cache.reset()
    else:
        cache.crop(-13)
    if int(cache.get_seq_length()):  # transformers 5.17 makes a dynamic cache zeros, and keeps its length
        assert is_packed(cache)
        return
    expected = model(tokens(1, 10)).logits
    word = cache_keyword(model)
    model(tokens(1, 10)[:, :9], **{word: cache})
    found = model(tokens(1, 10)[:, 9:], **{word: cache}).logits
    assert torch.allclose(found, expected[:, 9:], atol=1e-4)


@torch.no_grad()
def test_what_is_left_of_the_first_document_alone_can_be_continued() -> None:
    ids = tokens(1, 13)
    model, cache = filled()
    expected = model(torch.cat([ids[:, :5], tokens(1, 4)], 1)).logits
    cache.crop(-8)
    found = model(tokens(1, 4), **{cache_keyword(model): cache}).logits
    assert torch.allclose(found, expected[:, 5:], atol=1e-4)


@torch.no_grad()
def test_keys_of_packed_rows_are_plain_tensors_to_all_others() -> None:
    model, cache = filled()
    keys = cache.layers[0].keys
    assert type(keys) is PackedKeys
    assert type(keys[..., :8, :]) is type(keys @ keys.mT) is type(keys.sum()) is torch.Tensor
    held = io.BytesIO()
    torch.save(keys, held)
    held.seek(0)
    assert torch.equal(torch.load(held, weights_only=True), keys)
    axattn.restore(model)
    assert type(decode(model, cache)) is torch.Tensor


@torch.no_grad()
def test_a_graph_stops_at_a_packed_cache() -> None:
    model = axattn.apply(build("llama", num_hidden_layers=1), "auto")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    word = cache_keyword(model)
    for lengths, packed in (((13,), False), (LENGTHS, True)):
        cache = tf.DynamicCache(config=model.config)
        compiled(tokens(1, 13), position_ids=positions(lengths), **{word: cache})
        if packed:
            with pytest.raises((InvalidInputError, RuntimeError), match="filled by a row of several"):
                compiled(tokens(1, 1), position_ids=NEXT, **{word: cache})
        else:
            compiled(tokens(1, 1), position_ids=NEXT, **{word: cache})
