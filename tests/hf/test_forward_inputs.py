"""What a keyword means is known by one table; what no table knows is refused by name, never taken for harmless."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.errors import AxattnError, InvalidInputError, UnsupportedAttentionError
from axattn.hf import forward_inputs
from axattn.hf.caches import caches_in, is_cache, is_packed, mark_packed
from axattn.hf.forward_inputs import may_describe_documents, token_shape, unknown_tensors
from axattn.parallel.split_inputs import _require_known
from tests.models import build, positions, tokens
from tests.renamed import renamed

CACHE = forward_inputs.cache_keyword(build("llama"))
NEW = {CACHE: "satchel", "attention_mask": "veil", "position_ids": "rungs", "input_ids": "glyphs"}
LENGTHS = (4, 6)
NAMES = ("auto", "sdpa", "eager")


@functools.cache
def _module(folder: Path, *words: str) -> Any:
    return renamed("llama", {word: NEW[word] for word in words}, folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("renamed")


def copy_of(folder: Path, *words: str) -> Any:
    """The Llama of `build` under other words for some of its inputs."""
    source = build("llama")
    model = _module(folder, *words).LlamaForCausalLM(source.config.__class__(**source.config.to_dict())).eval()
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_one_under_any_keyword(folder: Path, name: str) -> None:
    model = axattn.apply(copy_of(folder, CACHE), name)
    where = positions(LENGTHS)
    if name == "auto":
        packed = model(tokens(1, 10), position_ids=where, use_cache=True)
        with pytest.raises(InvalidInputError, match="filled by a row of several documents"):
            model(tokens(1, 1), position_ids=torch.tensor([[6]]), satchel=packed[1])
    filled = model(tokens(1, 3), use_cache=True)[1]
    assert not is_packed(filled)
    with pytest.raises(AxattnError, match="cache"):
        model(tokens(1, 10), position_ids=where, satchel=filled)


@torch.no_grad()
def test_a_cache_that_a_packed_row_is_given_is_marked_though_it_is_not_returned(folder: Path) -> None:
    model, cache = axattn.apply(copy_of(folder, CACHE), "auto"), tf.DynamicCache()
    model(tokens(1, 10), position_ids=positions(LENGTHS), satchel=cache, return_dict=False)
    with pytest.raises(InvalidInputError, match="filled by a row of several documents"):
        model(tokens(1, 1), position_ids=torch.tensor([[6]]), satchel=cache)


@torch.no_grad()
def test_a_model_that_may_return_a_cache_by_an_unknown_keyword_is_not_unpadded_without_use_cache_false(
    folder: Path,
) -> None:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    wanted = build("llama")(tokens(2, 10), attention_mask=mask, use_cache=True)
    found = axattn.apply(copy_of(folder, CACHE), "auto", unpad=True)(tokens(2, 10), attention_mask=mask)
    assert torch.allclose(found.logits[mask != 0], wanted.logits[mask != 0], atol=1e-5)
    assert next(caches_in(found)).get_seq_length() == 10


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_mask_under_an_unknown_keyword_is_right_or_refused(folder: Path, name: str) -> None:
    model, ids = axattn.apply(copy_of(folder, "attention_mask"), name), tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    wanted = build("llama")(ids, attention_mask=mask).logits
    assert torch.allclose(model(ids, veil=mask).logits[mask != 0], wanted[mask != 0], atol=1e-5)
    document_ids = torch.tensor([[1] * 4 + [2] * 6] * 2)
    for dtype in (torch.long, torch.float32):
        with pytest.raises(UnsupportedAttentionError, match="veil: an unknown keyword"):
            model(ids, veil=document_ids.to(dtype))
    with pytest.raises(AxattnError, match=r"veil|ignores document boundaries"):
        model(ids, veil=mask, position_ids=positions(LENGTHS, LENGTHS))
    if name == "auto":
        unpadded = axattn.apply(copy_of(folder, "attention_mask"), name, unpad=True)
        assert torch.allclose(unpadded(ids, veil=mask).logits[mask != 0], wanted[mask != 0], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_positions_under_an_unknown_keyword_are_right_or_refused(folder: Path, name: str) -> None:
    model, ids = axattn.apply(copy_of(folder, "position_ids"), name), tokens(1, 10)
    for use_cache in (True, False):
        with pytest.raises(UnsupportedAttentionError, match="rungs: an unknown keyword"):
            model(ids, rungs=positions(LENGTHS), use_cache=use_cache)
    later = torch.arange(5, 15)[None]
    wanted = build("llama")(ids, position_ids=later).logits
    if name == "auto":  # it arrives at the attention function, which takes no keyword that it does not know
        with pytest.raises(UnsupportedAttentionError, match="an unsupported keyword"):
            model(ids, rungs=later)
    else:
        assert torch.allclose(model(ids, rungs=later).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tokens_under_an_unknown_keyword_are_refused_in_packed_rows(folder: Path, name: str) -> None:
    model = axattn.apply(copy_of(folder, "input_ids"), name)
    with pytest.raises(AxattnError, match=r"glyphs|use_cache on"):
        model(glyphs=tokens(1, 10), position_ids=positions(LENGTHS))
    wanted = build("llama")(tokens(1, 10)).logits
    assert torch.allclose(model(glyphs=tokens(1, 10)).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("word", ["attention_mask", "position_ids"])
def test_rows_are_not_split_with_an_unknown_keyword(folder: Path, word: str) -> None:
    given = {"input_ids": tokens(1, 10), NEW[word]: torch.ones(1, 10, dtype=torch.long)}
    with pytest.raises(UnsupportedAttentionError, match=f"{NEW[word]}: there is no known way to split it"):
        _require_known(copy_of(folder, word), given)


@pytest.mark.parametrize("word", ["attention_mask", "position_ids"])
def test_padded_rows_are_not_put_together_with_an_unknown_keyword(folder: Path, word: str) -> None:
    model = axattn.apply(build("llama"), "auto", unpad=True)
    mask = torch.tensor([[1] * 10, [0] * 4 + [1] * 6])
    with pytest.raises(AxattnError, match=f"{NEW[word]}: "):
        model(tokens(2, 10), attention_mask=mask, use_cache=False, **{NEW[word]: torch.ones(2, 10, dtype=torch.long)})


def test_unknown_keywords_in_a_graph_are_refused_when_it_runs(folder: Path) -> None:
    torch._dynamo.reset()
    model = axattn.apply(copy_of(folder, "position_ids"), "sdpa")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        later = torch.arange(5, 15)[None]
        wanted = build("llama")(tokens(1, 10), position_ids=later, use_cache=False).logits
        assert torch.allclose(compiled(tokens(1, 10), rungs=later, use_cache=False).logits, wanted, atol=1e-5)
        with pytest.raises(RuntimeError, match="rungs is unknown, and may describe packed documents"):
            compiled(tokens(1, 10), rungs=positions(LENGTHS), use_cache=False)


def row(*values: int) -> torch.Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize(
    ("x", "described"),
    [
        (row(0, 1, 2, 0, 1, 2), True),
        (row(2, 3, 4, 2, 3, 2), True),
        (row(1, 1, 2, 2, 3, 3), True),
        (row(0, 1, 1, 2, 2, 0), True),
        (row(0, 1, 2, 0, 1, 2)[0], True),
        (torch.stack([row(0, 1, 2, 0, 1, 2)] * 3), True),
        (row(1, 1, 1, 2, 2, 2).float(), True),
        (torch.tensor([0, 2, 6], dtype=torch.int32), True),
        (row(0, 1, 2, 3, 4, 5), False),
        (row(7, 8, 9, 10, 11, 12), False),
        (row(0, 0, 0, 1, 2, 3), False),
        (row(1, 1, 1, 0, 1, 2), False),
        (row(0, 0, 1, 1, 1, 1), False),
        (row(1, 1, 1, 1, 0, 0), False),
        (row(17, 4, 4, 5, 90, 3), False),
        (row(0, 1, 0, 1, 1, 0), False),
        (torch.tensor([0, 2, 5], dtype=torch.int32), False),
        (row(1, 1, 1, 2, 2, 2).bool(), None),
        (torch.randn(1, 6, 4), None),
    ],
)
def test_values_that_may_describe_documents(x: torch.Tensor, described: bool | None) -> None:
    found = may_describe_documents(x, None, 1, 6)
    assert found is None if described is None else (found is not None and bool(found) is described)


def test_positions_of_padding_describe_no_document() -> None:
    where, mask = row(0, 1, 2, 3, 1, 1), row(1, 1, 1, 1, 0, 0)
    assert may_describe_documents(where, mask, 1, 6) is not None
    assert not may_describe_documents(where, mask, 1, 6)


def test_what_an_unknown_keyword_holds_for_tokens() -> None:
    given = {
        "input_ids": torch.zeros(2, 6),
        "by_token": torch.zeros(2, 6, 3),
        "one_row": torch.zeros(1, 6),
        "flat": torch.zeros(12, 3),
        "pairs": torch.zeros(2, 1, 6, 6),
        "inside": {"x": torch.zeros(6)},
        "image": torch.zeros(2, 3, 8, 8),
        "number": torch.tensor(3),
        "setting": 4,
    }
    assert set(unknown_tensors(given, 2, 6)) == {"by_token", "one_row", "flat", "pairs", "inside"}


def test_caches_are_known_by_what_they_are() -> None:
    layer = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    caches = [tf.DynamicCache(), tf.StaticCache(config=build("llama").config, max_cache_len=4), (layer, layer)]
    caches.append(tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache()))
    assert all(map(is_cache, caches))
    others = [None, True, "cache", torch.zeros(2, 2), (torch.zeros(1, 2, 3),) * 3, {"update": 1}, build("llama")]
    assert not any(map(is_cache, others))
    assert list(caches_in({"states": [caches[0]]})) == [caches[0]]
    for cache in (*caches, [layer, layer]):
        mark_packed(cache, 2)
    assert is_packed(caches[2])
    assert not any(map(is_packed, (caches[0], caches[1], caches[3])))  # nothing is in them


def test_the_shape_of_tokens_under_an_unknown_keyword_is_that_of_the_positions() -> None:
    assert token_shape({"glyphs": torch.zeros(2, 6), "position_ids": torch.zeros(1, 6)}) == (2, 6)
    assert token_shape({"pixels": torch.zeros(2, 3, 8), "position_ids": torch.zeros(1, 6)}) is None


def test_words_are_owned_by_one_table() -> None:
    """No file of the package spells a keyword of caches but the table of inputs."""
    package = Path(axattn.__file__).parent
    words = ("past_key_values", "cache_params", "past_key_value")
    said = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(f'"{word}"' in path.read_text() or f"{word}=" in path.read_text() for word in words)
    }
    assert said == {"hf/forward_inputs.py"}
