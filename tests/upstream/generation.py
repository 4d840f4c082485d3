"""Generating in every way that Transformers knows, beside eager on the same weights: a mixin of axattn.

It asks what Transformers' `GenerationTesterMixin` asks, which its source package lacks (`sources.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.models import amplify

NEW = 5
PLAIN: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


class GenerationBesideEager:
    """One test for each way to generate; `ModelTesterMixin` beside it has the models."""

    all_generative_model_classes: tuple[Any, ...]
    model_tester: Any

    def test_ways_greedy(self) -> None:
        self._same()

    def test_ways_padded_on_the_left(self) -> None:
        self._same(pads=(3, 0, 1))

    def test_ways_padded_on_the_right(self) -> None:
        self._same(pads=(-2, 0, -1))

    def test_ways_with_a_hole_in_the_mask(self) -> None:
        self._same(hole=True)

    def test_ways_without_a_cache(self) -> None:
        self._same(pads=(3, 0, 1), use_cache=False)

    def test_ways_with_beams(self) -> None:
        self._same(pads=(3, 0, 1), num_beams=3)

    def test_ways_sampled(self) -> None:
        self._same(do_sample=True, num_return_sequences=2, top_k=3)

    def test_ways_with_a_static_cache(self) -> None:
        self._same(pads=(3, 0, 1), cache_implementation="static")

    def test_ways_with_a_prefill_in_chunks(self) -> None:
        self._same(text_only=True, prefill_chunk_size=3)

    def test_ways_with_prompt_lookup(self) -> None:
        self._same(rows=1, text_only=True, prompt_lookup_num_tokens=2)

    def test_ways_with_an_assistant(self) -> None:
        self._same(rows=1, text_only=True, assisted=True)

    def test_ways_from_embeddings(self) -> None:
        for model, eager, inputs in self._models(text_only=True):
            ids = inputs.pop("input_ids")
            found = [m.generate(**inputs, inputs_embeds=m.get_input_embeddings()(ids), **PLAIN) for m in (model, eager)]
            assert found[0].tolist() == found[1].tolist()

    def test_ways_going_on_from_a_cache(self) -> None:
        for model, eager, inputs in self._models(text_only=True, pads=(3, 0, 1)):
            once = eager.generate(**inputs, **PLAIN | {"max_new_tokens": 2 * NEW, "min_new_tokens": 2 * NEW})
            first = model.generate(**inputs, **PLAIN, return_dict_in_generate=True)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
            cache = {"past_key_values": first.past_key_values}
            found = model.generate(input_ids=first.sequences, attention_mask=mask, **cache, **PLAIN)
            assert found.tolist() == once.tolist()

    def _same(
        self,
        *,
        pads: tuple[int, ...] = (),
        hole: bool = False,
        rows: int = 3,
        text_only: bool = False,
        assisted: bool = False,
        **options: Any,
    ) -> None:
        for model, eager, inputs in self._models(text_only=text_only, pads=pads, hole=hole, rows=rows):
            found = []
            for one in (model, eager):
                helper = {"assistant_model": copy.deepcopy(one)} if assisted else {}
                torch.manual_seed(1)
                found.append(one.generate(**inputs, **PLAIN | options, **helper))
            assert found[0].tolist() == found[1].tolist()
            assert found[0].shape[1] >= NEW

    def _models(
        self, *, text_only: bool, pads: tuple[int, ...] = (), hole: bool = False, rows: int = 3
    ) -> list[tuple[Any, Any, dict[str, torch.Tensor]]]:
        """A model, the same on eager, and what both are to go on from, for every class that generates."""
        if not self.all_generative_model_classes:
            self.skipTest("no class of it generates")  # type: ignore[attr-defined]
        made = []
        for cls in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            if text_only and (config.is_encoder_decoder or "pixel_values" in inputs):
                self.skipTest("asks for text alone")  # type: ignore[attr-defined]
            model = cls(config).eval()
            amplify(model)
            eager = cls._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
            eager.load_state_dict(model.state_dict())
            made.append((model, eager, _prompt(inputs, pads, hole, rows)))
        return made


def _prompt(inputs: dict[str, torch.Tensor], pads: tuple[int, ...], hole: bool, rows: int) -> dict[str, torch.Tensor]:
    """Rows of a family's inputs, padded as asked (below zero: on the right), or with a masked token in the middle."""
    kept = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    if "pixel_values" in kept:  # all of the batch: pixels are not one row a sample
        rows = kept["input_ids"].shape[0]
        kept["attention_mask"] = torch.ones_like(kept["input_ids"])
    else:
        kept = {name: value[:rows].clone() for name, value in kept.items()}
        kept["attention_mask"] = torch.ones_like(kept["input_ids"])
        for row, count in enumerate(pads[:rows]):
            where = slice(0, count) if count >= 0 else slice(count, None)
            kept["attention_mask"][row, where] = kept["input_ids"][row, where] = 0
    if hole:
        kept["attention_mask"][0, 2] = 0
    return kept
