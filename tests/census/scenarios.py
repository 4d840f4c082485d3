"""What the census tries on each architecture, and on which names."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import axattn
from axattn.errors import Reason, UnsupportedAttentionError
from tests.census.configs import FEWER
from tests.census.expected import LENGTHS, Expected
from tests.census.images import TEXT
from tests.models import positions

FAKED = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers", "sage", "fp8")
"""Kernels that need a GPU: strict fakes stand in."""
NAMES = ("auto", "varlen", *FAKED)
ON_FEWER = ("auto", "varlen", "flash_attention_2", "eager", "sdpa")
"""Of `NAMES` and those of Transformers: what is tried on heads that classify, and on models without a head."""
ON_IMAGES = ("auto", "varlen", "flash_attention_2", "sdpa")
"""What is tried with an image in the text."""

Run = Callable[[Any, Expected], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Scenario:
    """One thing that is tried.

    Attributes:
        name: as in the tables.
        run: gives what a model gives, and what is right.
        names: the names it is tried on.
        heads: only for these; for all when empty.
        unpad: with ``unpad=True``.
        share: with ``share_prefixes=True``.
        gradients: run with gradients.
        image: only where an image could be made for the model.
        tolerance: largest error, relative to the largest value.
    """

    name: str
    run: Run
    names: tuple[str, ...] = NAMES
    heads: tuple[str, ...] = ()
    unpad: bool = False
    share: bool = False
    gradients: bool = False
    image: bool = False
    tolerance: float = 1e-4


def _dense(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    return expected.dense(model), expected.whole


def _right(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    return expected.on(model, "right"), expected.rows["right"]


def _left(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    return expected.on(model, "left"), expected.rows["left"]


def _packed(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    out = expected.logits(model, input_ids=expected.ids, position_ids=positions(LENGTHS))
    if expected.head == "rows":
        return out, torch.full_like(out, torch.inf)  # one output for several documents is wrong, whatever it is
    return out, expected.alone


def _packed_by_document_ids(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """No positions: the mask holds document ids."""
    document_ids = torch.tensor([[number + 1 for number, length in enumerate(LENGTHS) for _ in range(length)]])
    out = expected.logits(model, input_ids=expected.ids, attention_mask=document_ids)
    if expected.head == "rows":
        return out, torch.full_like(out, torch.inf)
    return out, expected.alone


def _packed_from_1(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions as RoBERTa counts them where padding is token 0; on eager each document alone, with the same ones."""
    found = expected.logits(model, input_ids=expected.ids, position_ids=positions(LENGTHS) + 1)
    return found, expected.alone_from_1


def _packed_by_lengths(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """No positions: the lengths of the documents have to do."""
    edges = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 9, "max_length_k": 9}
    return model(input_ids=expected.ids, **lengths, **expected.options).logits, expected.alone


def _gradients(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the token embeddings, packed, against the sum over documents alone on eager."""
    model.zero_grad()
    table = model.get_input_embeddings().weight
    model(input_ids=expected.ids, position_ids=positions(LENGTHS), **expected.options).logits.square().sum().backward()
    found = table.grad
    model.zero_grad()
    return found, expected.gradients


def _shared(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions of one prompt: their logits and the gradient of the token embeddings, each document alone on eager.

    Raises:
        UnsupportedAttentionError: the prompt ran several times.
    """
    model.zero_grad()
    table, ran = model.get_input_embeddings(), []
    handle = table.register_forward_hook(lambda module, args, out: ran.append(out.shape[:-1].numel()))
    try:
        found = expected.with_gradients(model, expected.completions, expected.completions_mask)
    finally:
        handle.remove()
        model.zero_grad()
    if not ran or max(ran) >= int(expected.completions_mask.sum()):
        raise UnsupportedAttentionError("the batch ran as it came", [Reason("stems", "its prefixes ran repeated")])
    return found, expected.completions_alone


def _generate(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """Six more tokens after rows padded on the left, from the logits at each step."""

    def run(model: Any) -> torch.Tensor:
        inputs = {"input_ids": expected.padded["left"], "attention_mask": expected.masks["left"]}
        greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        made = model.generate(**inputs, **greedy, output_logits=True, return_dict_in_generate=True)
        return torch.stack(made.logits)

    eager = axattn.restore(copy.deepcopy(model))  # dynamic NTK remembers the longest row
    return run(model), run(eager)


def _image(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    assert expected.image is not None
    return expected.logits(model, **expected.image.row(expected.image.ids)), expected.images["alone"]


def _image_padded(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    assert expected.image is not None
    batch = expected.image.padded()
    return expected.logits(model, **batch)[batch["attention_mask"].bool()], expected.images["padded"]


def _image_packed(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """Before a document without one, and after it."""
    image = expected.image
    assert image is not None
    rows = [expected.logits(model, **image.packed(*parts)) for parts in ((image.ids, TEXT), (TEXT, image.ids))]
    return torch.cat(rows, 1), torch.cat([expected.images["first"], expected.images["last"]], 1)


_ONE_SIDED = ("causal", "masked", "vision")
SCENARIOS = (
    Scenario("dense", _dense),
    Scenario("right padding", _right),
    Scenario("left padding", _left),
    Scenario("packed", _packed, (*NAMES, "eager", "sdpa"), (*_ONE_SIDED, *FEWER)),
    Scenario("packed, from position 1", _packed_from_1, ("auto",), ("masked", "tokens", "questions", "none")),
    Scenario("packed, document ids in the mask", _packed_by_document_ids, ("auto",), (*_ONE_SIDED, *FEWER)),
    Scenario("packed, cu_seq_lens alone", _packed_by_lengths, ("auto", "flash_attention_2"), _ONE_SIDED),
    Scenario("packed gradients", _gradients, NAMES, _ONE_SIDED, gradients=True),
    Scenario("right padding, unpad", _right, ("auto",), unpad=True),
    Scenario("left padding, unpad", _left, ("auto",), unpad=True),
    Scenario("shared prefixes", _shared, ("auto",), ("causal",), share=True, gradients=True),
    Scenario("generate, left padding", _generate, ("auto",), ("causal", "vision")),
    Scenario("image", _image, ON_IMAGES, ("vision",), image=True),
    Scenario("image, left padding", _image_padded, ON_IMAGES, ("vision",), image=True),
    Scenario("image, packed", _image_packed, ON_IMAGES, ("vision",), image=True),
)
