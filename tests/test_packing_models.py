"""Packed rows equal each document alone, on every family, however the documents are described."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers.masking_utils import create_chunked_causal_mask

import axattn
from axattn.errors import InvalidInputError
from tests.models import CONFIGS, alone, build, positions, tokens

LENGTHS = (7, 11, 3)
TOLERANCE = 2e-5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("scenario", ["cache on", "cache off", "all-ones mask", "cu_seq_lens"])
def test_a_packed_row_equals_its_documents_alone(family: str, scenario: str) -> None:
    model = build(family)
    ids = tokens(1, sum(LENGTHS))
    expected = alone(model, ids, LENGTHS)
    axattn.apply(model, "auto")
    inputs = {"position_ids": positions(LENGTHS), "use_cache": scenario != "cache off"}
    if scenario == "all-ones mask":
        inputs["attention_mask"] = torch.ones_like(ids)
    if scenario == "cu_seq_lens":
        inputs |= {"cu_seq_lens_q": torch.tensor([0, 7, 18, 21], dtype=torch.int32)}
        inputs |= {"cu_seq_lens_k": inputs["cu_seq_lens_q"], "max_length_q": 11, "max_length_k": 11}
        if family == "opt":
            pytest.skip("OPT's forward takes no such keywords")
    found = model(ids, **inputs).logits
    assert relative(found, expected) < TOLERANCE


@torch.no_grad()
def test_many_packed_rows_with_padding_equal_their_documents_alone(family: str) -> None:
    model = build(family)
    ids = tokens(2, 21)
    rows = ((7, 11, 3), (5, 9))  # the second row ends in 7 padding tokens
    expected = [alone(model, ids[:1], rows[0]), alone(model, ids[1:, :14], rows[1])]
    axattn.apply(model, "auto")
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    found = model(ids, position_ids=positions(rows[0], (*rows[1], 7)), attention_mask=mask).logits
    assert relative(found[:1], expected[0]) < TOLERANCE
    assert relative(found[1:, :14], expected[1]) < TOLERANCE


def test_changing_a_document_leaves_the_others_bit_identical(family: str) -> None:
    model = build(family)
    axattn.apply(model, "auto")
    ids = tokens(1, sum(LENGTHS))
    changed = ids.clone()
    changed[0, 8:14] = 3 + (changed[0, 8:14] - 2) % 94
    where = positions(LENGTHS)
    with torch.no_grad():
        before, after = (model(x, position_ids=where).logits for x in (ids, changed))
    assert not torch.equal(before[:, 7:18], after[:, 7:18])
    if family in ("mixtral", "gpt_oss", "deepseek_v3", "llama4"):  # experts batch tokens of all documents together
        assert relative(after[:, :7], before[:, :7]) < TOLERANCE
        assert relative(after[:, 18:], before[:, 18:]) < TOLERANCE
    else:
        assert torch.equal(before[:, :7], after[:, :7])
        assert torch.equal(before[:, 18:], after[:, 18:])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_gradients_of_a_packed_row_equal_the_sum_of_its_documents(family: str, checkpointing: bool | None) -> None:
    torch.manual_seed(0)
    ids = tokens(1, sum(LENGTHS))
    target = torch.randn(1, sum(LENGTHS), 97)

    reference = build(family).train()
    reference.set_attn_implementation("eager")
    start = 0
    for length in LENGTHS:
        logits = reference(ids[:, start : start + length], use_cache=False).logits
        (logits * target[:, start : start + length]).sum().backward()
        start += length

    model = build(family).train()
    axattn.apply(model, "auto")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    (model(ids, position_ids=positions(LENGTHS)).logits * target).sum().backward()
    for (name, wanted), (_, got) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        if wanted.grad is None:
            assert got.grad is None, name
        else:
            assert got.grad is not None, name
            assert relative(got.grad, wanted.grad) < 2e-4, name


@torch.no_grad()
def test_documents_that_do_not_start_at_position_0_are_kept_apart() -> None:
    model = build("llama")
    ids = tokens(1, 10)
    where = torch.tensor([[3, 4, 5, 6, 9, 10, 11, 12, 13, 14]])
    expected = alone(model, ids, (4, 6))  # RoPE is relative: a shift of all positions changes nothing
    axattn.apply(model, "varlen")
    assert relative(model(ids, position_ids=where).logits, expected) < TOLERANCE


@torch.no_grad()
def test_a_mask_of_document_numbers_keeps_documents_apart() -> None:
    model = build("llama")
    ids = tokens(1, 12)
    expected = alone(model, ids[:, :10], (4, 6))
    axattn.apply(model, "varlen")
    numbers = torch.tensor([[1] * 4 + [2] * 6 + [0] * 2])
    found = model(ids, attention_mask=numbers, position_ids=positions((4, 6, 2))).logits
    assert relative(found[:, :10], expected) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "llama4"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_their_documents_alone(family: str, side: str) -> None:
    model = build(family)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    pad = slice(0, 5) if side == "left" else slice(7, 12)
    real = slice(5, 12) if side == "left" else slice(0, 7)
    mask[1, pad] = 0
    expected = [alone(model, ids[:1], (12,)), alone(model, ids[1:, real], (7,))]
    axattn.apply(model, "auto")
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(ids, attention_mask=mask, position_ids=where).logits
    assert relative(found[:1], expected[0]) < TOLERANCE
    assert relative(found[1:, real], expected[1]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "llama4"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_of_a_left_padded_batch_equals_eager(family: str, cache: str) -> None:
    model = build(family)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    if (family, cache) == ("llama4", "static") and "block_sequence_ids" not in inspect.signature(
        create_chunked_causal_mask
    ).parameters:
        pytest.skip("this version of Transformers raises in its own mask builder")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, attention_mask=mask, **options)
    axattn.apply(model, "auto")
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


@torch.no_grad()
def test_decoding_from_a_cache_that_a_packed_row_filled_is_refused() -> None:
    model = build("llama")
    axattn.apply(model, "varlen")
    out = model(tokens(1, 21), position_ids=positions(LENGTHS), use_cache=True)
    with pytest.raises(InvalidInputError, match="filled by a row of several documents"):
        model(tokens(1, 1), past_key_values=out.past_key_values)
