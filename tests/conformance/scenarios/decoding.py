"""Generation, and several tokens at once over a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.conformance.cases import Case, Result, packed, padded
from tests.conformance.scenarios.base import DECODERS, scenario
from tests.models import tokens


def _generated(case: Case, **options: Any) -> tuple[Result, Callable[[], Result]]:
    """Greedy tokens of a left-padded batch, against each row alone, unpadded, on eager with a dynamic cache."""
    batch = padded(9, 5, side="left")
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model = case.reference()
    rows = [model.generate(batch.ids[r : r + 1, a:b], **greedy)[0, b - a :] for r, a, b in batch.documents]

    def found() -> Result:
        on_axattn = case.candidate().generate(batch.ids, attention_mask=batch.mask, **greedy, **options)
        return {"tokens": on_axattn[:, batch.ids.shape[1] :].float()}

    return {"tokens": torch.stack(rows).float()}, found


@scenario("generate, left padding", DECODERS)
def generate(case: Case) -> Any:
    return _generated(case)


@scenario("generate, static cache", DECODERS)
def generate_static(case: Case) -> Any:
    return _generated(case, cache_implementation="static", disable_compile=True)


@scenario("generate, prefill in chunks", DECODERS)
def generate_chunks(case: Case) -> Any:
    """A long prompt, left-padded, in parts: what is padding in a part comes after the cache in the mask."""
    return _generated(case, prefill_chunk_size=4)


@scenario("prefill, then two chunks over the cache", DECODERS)
def chunks_over_a_cache(case: Case) -> Any:
    """Several tokens at once over a filled cache (speculative decoding): bottom-right alignment."""
    batch = packed((15,))
    with torch.no_grad():
        expected = {"logits": case.alone(batch)}

    def found() -> Result:
        model, cache, parts = case.candidate(), None, []
        with torch.no_grad():
            for a, b in ((0, 8), (8, 12), (12, 15)):
                where = case.positions(batch.positions[:, a:b])
                out = model(batch.ids[:, a:b], position_ids=where, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out[0][0])
        return {"logits": torch.cat(parts)}

    return expected, found


@scenario("second turn of a batch over the cache", DECODERS)
def second_turn(case: Case) -> Any:
    """Prompts of two lengths in each turn, padded on the left: padding between the turns, and then a decoded token.
    Eager with the same masks says what is right."""
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[0, :3], mask[1, 8:11] = 0, 0
    where = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)

    def run(model: Any) -> Result:
        cache, parts = None, []
        with torch.no_grad():
            for a, b in ((0, 8), (8, 15), (15, 16), (16, 17)):
                given = {"attention_mask": mask[:, :b], "position_ids": case.positions(where[:, a:b])}
                out = model(ids[:, a:b], **given, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out[0][mask[:, a:b].bool()])
        return {"logits": torch.cat(parts)}

    return run(case.reference()), lambda: run(case.candidate())
