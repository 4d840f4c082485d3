"""`Chat`: turns over one cache, and what happens to it in between; the same calls on stock eager are the oracle."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import transformers as tf

from tests.fuzz.families import FAMILIES

Side = Literal["left", "right", "hole"]
Between = Literal["nothing", "copy", "deepcopy", "reorder", "rebuilt", "reset", "crop"]
EMPTIES = ("reset",)
"""What leaves nothing of the first turn in the cache."""
_GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@dataclass(frozen=True)
class Prompt:
    """One turn of every row.

    Attributes:
        lengths: tokens of each row; shorter ones are padded.
        side: where: before, after, or in the middle.
    """

    lengths: tuple[int, ...]
    side: Side = "left"

    @cached_property
    def real(self) -> torch.Tensor:
        """int64 ``[B, S]``: 1 for real tokens."""
        longest = max(self.lengths)
        real = torch.ones(len(self.lengths), longest, dtype=torch.int64)
        for row, length in enumerate(self.lengths):
            at = {"left": 0, "right": length, "hole": length // 2}[self.side]
            real[row, at : at + longest - length] = 0
        return real


@dataclass(frozen=True)
class Chat:
    """What is drawn.

    Attributes:
        family: one of `FAMILIES`.
        name: attention implementation under test.
        turns: prompts, one after the other.
        packed: the first turn holds two documents in each row (without padding): nothing may go on from it.
        kind: of the cache.
        between: what is done to the cache after the first turn.
        last: the last turn is a forward, `generate` over the cache, or (with a cache of its own) beam search.
        seed: of the tokens.
    """

    family: str = "llama"
    name: str = "auto"
    turns: tuple[Prompt, ...] = (Prompt((4,)),)
    packed: bool = False
    kind: Literal["dynamic", "static"] = "dynamic"
    between: Between = "nothing"
    last: Literal["forward", "generate", "beams"] = "forward"
    seed: int = 1

    @property
    def script(self) -> str:
        """To paste into a shell at the project's root."""
        return f'python -c "from tests.fuzz.verdict import *; print(run({self!r}))"'

    @property
    def leaks(self) -> bool:
        """Whether a turn goes on from documents that a row of several has left in the cache."""
        first = self.turns[0]
        two = self.packed and max(first.lengths) > 1
        if self.between == "crop" and self.kind == "dynamic" and max(first.lengths) // 2 == 1:
            two = False  # the second document was one token, and is cut off
        following = len(self.turns) - (2 if self.last == "beams" else 1)  # beams have a cache of their own
        return two and following > 0 and self.between not in EMPTIES

    def play(self, model: Any) -> dict[str, torch.Tensor]:
        """What the turns give: logits of real tokens ``[tokens, V]``, and tokens."""
        torch.manual_seed(self.seed)
        found: dict[str, torch.Tensor] = {}
        total = sum(max(turn.lengths) for turn in self.turns) + 8
        cache: Any = tf.DynamicCache() if self.kind == "dynamic" else tf.StaticCache(model.config, max_cache_len=total)
        ids = torch.zeros(len(self.turns[0].lengths), 0, dtype=torch.int64)
        mask = ids
        for number, turn in enumerate(self.turns):
            real = turn.real
            two = self.packed and number == 0
            if two:
                real = torch.ones_like(real)
            new = torch.randint(3, 90, real.shape, generator=torch.Generator().manual_seed(self.seed + number))
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, real], 1)
            last = number == len(self.turns) - 1
            if last and self.last == "beams":
                found["beams"] = model.generate(ids, attention_mask=mask, num_beams=2, **_GREEDY)
                break
            if last and self.last == "generate" and not two:
                given = {"past_key_values": cache} if number else {}
                found["tokens"] = model.generate(ids, attention_mask=mask, **given, **_GREEDY)[:, ids.shape[1] :]
                break
            where = (mask.cumsum(-1) - 1).clamp(min=0)[:, -real.shape[1] :]
            inputs: dict[str, Any] = {"attention_mask": mask}
            if two:
                where, inputs = torch.cat([where[:, : -(-where.shape[1] // 2)], where[:, : where.shape[1] // 2]], 1), {}
            with torch.no_grad():
                out = model(new, position_ids=where, past_key_values=cache, use_cache=True, **inputs)
            if not two:
                found[f"turn {number}"] = out.logits[real.bool()]
            if number == 0:
                cache, ids, mask = self._between(cache, ids, mask)
        return found

    def _between(self, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
        how = self.between
        if how == "copy":
            return copy.copy(cache), ids, mask
        if how == "deepcopy":
            return copy.deepcopy(cache), ids, mask
        if how == "reorder":
            order = torch.arange(ids.shape[0]).flip(0)
            cache.reorder_cache(order)
            return cache, ids[order], mask[order]
        if how == "reset":
            cache.reset()
            return cache, ids[:, :0], mask[:, :0]
        if how == "rebuilt" and self.kind == "dynamic":
            other = tf.DynamicCache()
            for number, layer in enumerate(cache.layers):
                other.update(layer.keys, layer.values, number)
            return other, ids, mask
        if how == "crop" and self.kind == "dynamic" and ids.shape[1] > 1:
            cache.crop(-1)
            return cache, ids[:, :-1], mask[:, :-1]
        return cache, ids, mask


assert "llama" in FAMILIES
