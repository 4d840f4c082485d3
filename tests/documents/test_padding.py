"""Padding in front of documents, between them and inside of one: none of it ends a document, or is part of the next."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.traits import position_ids
from tests.models import LAYERS, amplify, build, tokens
from tests.sampling import SAMPLE, part_of
from tests.traits.test_dynamic_rope import long

# ---- holes in a mask of 0 and 1: one document, as Transformers' generate counts it ---------------------------------

IDS = tokens(2, 12)
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[0, 4:6], MASK[1, :2], MASK[1, 7:8] = 0, 0, 0
WHERE = (MASK.cumsum(-1) - 1).masked_fill(MASK == 0, 1)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize(
    ("name", "compiled"),
    part_of(
        itertools.product(("auto", "sdpa"), (False, True)), kept=[("auto", True), ("auto", False), ("sdpa", False)]
    ),
)
@torch.no_grad()
def test_a_row_with_non_contiguous_padding_is_one_document(name: str, compiled: bool) -> None:
    model = build("llama")
    expected = model(IDS, attention_mask=MASK, position_ids=WHERE).logits[MASK.bool()]
    axattn.apply(model, name)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if compiled else model
    for mask in (MASK,) if compiled else (MASK, MASK.bool(), MASK.float()):
        found = run(IDS, attention_mask=mask, position_ids=WHERE, use_cache=not compiled).logits[MASK.bool()]
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["", "static"])
@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_continues_after_padding_in_the_prompt_and_over_the_cache(
    family: str, name: str, cache: dict[str, Any]
) -> None:
    """A first turn with a pad token in it, then a second turn over its cache, padded to the longest answer."""

    def chat(model: Any) -> torch.Tensor:
        one = model.generate(IDS, attention_mask=MASK, return_dict_in_generate=True, **GREEDY, **cache)
        if cache:
            return one.sequences
        more = torch.cat([one.sequences, tokens(2, 5, seed=3)], 1)
        mask = torch.cat([MASK, torch.ones(2, 9, dtype=torch.long)], 1)
        mask[0, 16:19] = 0
        held = {"past_key_values": one.past_key_values}
        return model.generate(more, attention_mask=mask, **held, **GREEDY)

    model = build(family)
    expected = chat(model)
    assert torch.equal(chat(axattn.apply(model, name)), expected)


def test_a_prompt_with_padding_in_a_decoder_that_has_an_encoder() -> None:
    """Whisper's long form gives its decoder earlier text, padded to the longest of the batch."""
    torch.manual_seed(0)
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    sides |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "suppress_tokens": None}
    ids = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 4}
    sizes = {"vocab_size": 97, "num_mel_bins": 8, "d_model": 32, "max_source_positions": 30, "max_target_positions": 40}
    config = tf.WhisperConfig(**sizes, **sides, **ids, begin_suppress_tokens=None)
    model = tf.WhisperForConditionalGeneration(config).eval()
    amplify(model)
    model.set_attn_implementation("eager")
    given = {"input_features": torch.randn(2, 8, 60), "decoder_input_ids": IDS, "decoder_attention_mask": MASK}
    expected = tf.GenerationMixin.generate(model, **given, **GREEDY)  # as Whisper's own generate calls it for a segment
    for name in ("auto", "sdpa"):
        assert torch.equal(tf.GenerationMixin.generate(axattn.apply(model, name), **given, **GREEDY), expected)


# ---- documents with padding in front of them and between them -------------------------------------------------------


SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def encoder(config: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    amplify(model)
    return model


def esm() -> Any:
    """Scales its embeddings by the share of masked tokens in a row."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "emb_layer_norm_before": False}
    return encoder(tf.EsmConfig(**SIZES, **quiet, pad_token_id=0, mask_token_id=4, token_dropout=True))


MODELS = {
    "learned positions": lambda: build("opt"),
    "positions from 1": lambda: encoder(tf.RobertaConfig(**SIZES, pad_token_id=0)),
    "shares of masked tokens": esm,
    "chunks": lambda: build("llama4", layer_types=["chunked_attention", "full_attention"]),
    "window": lambda: build("gemma3", layer_types=LAYERS),
    "longrope": long,
}
DOCUMENT_IDS = torch.tensor(
    [[0] * 3 + [1] * 5 + [2] * 6 + [0] * 2 + [3] * 4, [5] * 8 + [0] * 3 + [2] * 2 + [5] * 6 + [0]]
)
TOKENS = tokens(*DOCUMENT_IDS.shape).masked_fill(DOCUMENT_IDS == 0, 0)
DOCUMENTS = ((0, 3, 8), (0, 8, 14), (0, 16, 20), (1, 0, 8), (1, 11, 13), (1, 13, 19))


def positions(first: int, filler: int) -> torch.Tensor:
    found = torch.full_like(DOCUMENT_IDS, filler)
    for row, a, b in DOCUMENTS:
        found[row, a:b] = torch.arange(b - a) + first
    return found


def cut(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits[row, a:b] for row, a, b in DOCUMENTS])


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_documents_equal_those_alone_wherever_padding_is(kind: str) -> None:
    torch._dynamo.reset()
    eager = MODELS[kind]()
    first = position_ids.first_position(eager)
    cache = {"use_cache": False} if isinstance(eager, tf.GenerationMixin) else {}
    expected = torch.cat([eager(TOKENS[row : row + 1, a:b], **cache).logits[0] for row, a, b in DOCUMENTS])
    model = axattn.apply(copy.deepcopy(eager), "auto")
    runs, compiled = [model], torch.compile(model, backend="eager")
    if kind == "chunks":
        runs.append(compiled)
    if kind in ("learned positions", "longrope"):
        runs.append(axattn.apply(copy.deepcopy(eager), "auto", unpad=True))
    inputs: list[dict[str, Any]] = [{"attention_mask": DOCUMENT_IDS}]
    inputs += [{"attention_mask": (DOCUMENT_IDS > 0).long(), "position_ids": positions(first, n)} for n in (first, 7)]
    for run in runs:
        for given in inputs if run is not compiled or SAMPLE == "nightly" else inputs[:1]:
            found = cut(run(TOKENS, **given, **cache).logits)
            assert torch.allclose(found, expected, atol=1e-4), list(given)


def test_padding_is_no_document_in_what_a_refusal_says() -> None:
    model = axattn.apply(build("llama"), "sdpa")
    with pytest.raises(axattn.UnsupportedAttentionError, match=r"\(6 documents in 2 rows\)"):
        model(TOKENS, attention_mask=DOCUMENT_IDS)
