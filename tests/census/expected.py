"""Batches for a model of the census, and what is right on them: eager attention, each document alone."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from tests.census.configs import FEWER
from tests.census.images import TEXT, Image, image_of
from tests.models import positions

LENGTHS = (7, 9, 4)
END = 2
"""``eos_token_id`` of the tiny configs."""


class Expected:
    """Batches, and what eager gives on them: each document alone, whole rows, padded rows. Computed once for all names.

    Attributes:
        ids: int64 ``[1, 20]``: documents of `LENGTHS`.
        leak: how far the logits of the documents move when they run into each other.
    """

    def __init__(self, model: Any, head: str) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = model
        self.options: dict[str, Any] = {} if head in ("masked", *FEWER) else {"use_cache": False}
        self.head = head
        if head == "seq2seq" and not model.config.is_encoder_decoder:
            raise ValueError("no encoder-decoder")
        self.ids = torch.randint(3, 60, (1, sum(LENGTHS)), generator=generator)
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, 7:] = 0
        two = torch.randint(3, 60, (2, 12), generator=generator)
        self.masks = {"right": mask, "left": mask.flip(1)}
        self.padded = {side: two * m for side, m in self.masks.items()}  # pad_token_id 0
        if head == "rows":  # BART reads the token that ends a row
            self.ids[:, -1] = END
            for side, ids in self.padded.items():
                last = ids.shape[1] - 1 - self.masks[side].flip(1).argmax(-1, keepdim=True)
                ids.scatter_(1, last, END)
        if head == "seq2seq":  # as many targets as source tokens: what a mask of one side must not do to the other
            self.options["decoder_input_ids"] = torch.randint(3, 60, (2, 12), generator=generator)
        with torch.no_grad():
            reference = _on_sdpa(model) if head == "questions" else model
            self.rows = {side: self.on(reference, side) for side in self.masks}
            self.whole = self.dense(model)
            if model.config.model_type == "moshi":
                _require_causal(model, self.ids, self.whole)
            self.alone = self.whole
            self.leak = 0.0
            self.image = image_of(model) if head == "vision" else None
            self.images = {} if self.image is None else self._with_images(model, self.image)
            if head not in ("seq2seq", "rows"):
                parts = [self.logits(model, input_ids=part) for part in self.ids.split(LENGTHS, 1)]
                self.alone = torch.cat(parts, 1)
                self.leak = (self.whole - self.alone).abs().max().item()

    @functools.cached_property
    def alone_from_1(self) -> torch.Tensor:
        """As `alone`, with positions that count from 1."""
        parts = zip(self.ids.split(LENGTHS, 1), (positions(LENGTHS) + 1).split(LENGTHS, 1), strict=True)
        with torch.no_grad():
            return torch.cat([self.logits(self.model, input_ids=ids, position_ids=at) for ids, at in parts], 1)

    @functools.cached_property
    def gradients(self) -> torch.Tensor:
        """The gradient of the token embeddings, summed over the documents alone."""
        model = copy.deepcopy(self.model)
        with torch.enable_grad():
            for part in self.ids.split(LENGTHS, 1):
                model(input_ids=part, **self.options).logits.square().sum().backward()
        found: torch.Tensor = model.get_input_embeddings().weight.grad
        return found

    @functools.cached_property
    def completions(self) -> torch.Tensor:
        """int64 ``[3, 24]``: a prompt of 18 tokens with three completions, padded on the right."""
        generator = torch.Generator().manual_seed(4)
        prompt, rest = (torch.randint(3, 60, size, generator=generator) for size in ((1, 18), (3, 6)))
        return torch.cat([prompt.expand(3, -1), rest], 1) * self.completions_mask

    @functools.cached_property
    def completions_mask(self) -> torch.Tensor:
        """The mask of `completions`."""
        return (torch.arange(24) < torch.tensor([[24], [21], [23]])).long()

    @functools.cached_property
    def completions_alone(self) -> torch.Tensor:
        """What `with_gradients` gives of `completions`, each row alone."""
        model = copy.deepcopy(self.model)
        rows = [row[mask.bool()][None] for row, mask in zip(self.completions, self.completions_mask, strict=True)]
        with torch.enable_grad():
            parts = [self.with_gradients(model, row) for row in rows]
        gradient = model.get_input_embeddings().weight.grad
        return torch.cat([part[: -gradient.numel()] for part in parts] + [gradient.flatten()])

    def with_gradients(self, model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The real tokens' logits and the gradient of the embeddings, so far, of the sum of their squares; flat."""
        given = {} if mask is None else {"attention_mask": mask}
        real = torch.ones_like(ids) if mask is None else mask
        found = self.logits(model, input_ids=ids, **given)[real.bool()]
        found.square().sum().backward()
        return torch.cat([found.detach().flatten(), model.get_input_embeddings().weight.grad.flatten()])

    def logits(self, model: Any, **inputs: Any) -> torch.Tensor:
        """Logits ``[B, S, ...]``, of a head with one output a row ``[B, labels]``."""
        return logits_of(model(**inputs, **self.options))

    def _with_images(self, model: Any, image: Image) -> dict[str, torch.Tensor]:
        """Of documents with an image and without: alone, one after the other in each order, in a padded batch."""
        seen, text = (self.logits(model, **image.row(part)) for part in (image.ids, TEXT))
        batch = image.padded()
        padded = self.logits(model, **batch)[batch["attention_mask"].bool()]
        return {
            "alone": seen,
            "first": torch.cat([seen, text], 1),
            "last": torch.cat([text, seen], 1),
            "padded": padded,
        }

    def dense(self, model: Any) -> torch.Tensor:
        """Logits of whole rows."""
        return self.logits(model, input_ids=self.ids if self.head != "seq2seq" else self.padded["right"].clamp(min=3))

    def on(self, model: Any, side: str) -> torch.Tensor:
        """The loss, each row's pooled output and the real tokens' logits of a padded batch; of an encoder-decoder, the
        logits of every target."""
        mask, ids = self.masks[side], self.padded[side]
        if self.head == "seq2seq":
            return self.logits(model, input_ids=ids, attention_mask=mask)
        made = model(input_ids=ids, attention_mask=mask, **self._labels(ids, mask), **self.options)
        logits = logits_of(made)
        others = [made[key].flatten() for key in ("loss", "pooler_output") if made.get(key) is not None]
        return torch.cat([*others, (logits if self.head == "rows" else logits[mask.bool()]).flatten()])

    def _labels(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.head == "none":
            return {}
        if self.head == "rows":
            return {"labels": torch.tensor([0, 1])}
        if self.head == "questions":
            first = mask.argmax(-1)
            return {"start_positions": first + 1, "end_positions": first + 3}
        if self.head == "tokens":
            return {"labels": (ids % 2).masked_fill(mask == 0, -100)}
        # what padding predicts is nobody's business
        target = mask * torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1)
        return {"labels": ids.masked_fill(target == 0, -100)}


def _on_sdpa(model: Any) -> Any:
    """A copy on Transformers' default, if it takes that.

    Heads that find answers read padding, and a query that may see nothing is zero there; on eager it is the mean of all
    values.
    """
    copied = copy.deepcopy(model)
    if model._supports_sdpa:
        copied.set_attn_implementation("sdpa")
    return copied


def logits_of(output: Any) -> torch.Tensor:
    """The logits of an output (of where an answer starts and ends as one tensor), without a head the hidden states."""
    if "last_hidden_state" in output:
        hidden: torch.Tensor = output.last_hidden_state
        return hidden
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    found: torch.Tensor = output.logits
    return found


def _require_causal(model: Any, ids: torch.Tensor, whole: torch.Tensor) -> None:
    """Moshi makes no mask where none is given, and eager attention is then not causal (transformers 5.17)."""
    shorter = model(input_ids=ids[:, :-1], use_cache=False).logits
    if not torch.allclose(shorter, whole[:, :-1], atol=1e-4):
        raise ValueError("eager attention sees later tokens here: nothing to compare with")
