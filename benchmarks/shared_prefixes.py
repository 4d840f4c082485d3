"""Prompts that several completions share: a training step that runs each prompt once, beside the batch as it came."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.models import llama

SHAPES = ((512, 8, 64), (1024, 4, 128), (256, 2, 256))
"""Tokens of the prompt, completions, tokens of each."""
AIMS = (4.3, 2.7, 1.28)


def shared_prefixes(rounds: int = 5) -> dict[str, Any]:
    """CPU time of a step of ``unpad=True`` by that of ``share_prefixes=True``, in random turns, for each of `SHAPES`:
    with logits of the completions alone (``logits_to_keep``, as GRPO asks for them) and with all logits (``labels``),
    which are computed for every place of the batch. Then of a batch in which nothing is shared, by ``unpad=True``."""
    import copy

    import torch

    import axattn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = llama(384, 6, 6, 2048).train()
    models = {
        "unpad": axattn.apply(copy.deepcopy(base), "auto", unpad=True),
        "shared": axattn.apply(copy.deepcopy(base), "auto", share_prefixes=True),
    }

    def step(model: Any, batch: dict[str, Any]) -> None:
        out = model(**batch, use_cache=False)
        loss = out.loss
        if loss is None:
            kept = batch["input_ids"][:, 1 - batch["logits_to_keep"] :]
            loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), kept.flatten())
        loss.backward()
        model.zero_grad(set_to_none=True)

    found: dict[str, Any] = {}
    for (prompt, rows, length), aim in zip(SHAPES, AIMS, strict=True):
        ids = torch.randint(3, 2048, (rows, prompt + length))
        ids[:, :prompt] = ids[0, :prompt]
        labels = ids.clone()
        labels[:, :prompt] = -100
        tokens = rows * (prompt + length) / (prompt + rows * length)
        entry: dict[str, Any] = {"aim": aim, "tokens": round(tokens, 2)}
        for name, more in {"completions": {"logits_to_keep": length + 1}, "all logits": {"labels": labels}}.items():
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
            times = _in_random_turns(models, lambda model, batch=batch: step(model, batch), rounds)
            entry[name] = round(statistics.median(times["unpad"]) / statistics.median(times["shared"]), 2)
        found[f"{prompt} + {rows} x {length}"] = entry
    ids = torch.randint(3, 2048, (4, 512))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    times = _in_random_turns(models, lambda model: step(model, batch), 4 * rounds)
    ratio = statistics.median(times["shared"]) / statistics.median(times["unpad"])
    found["nothing shared"] = {"times": round(ratio, 3), "aim": "<= 1.02"}
    return found


def _in_random_turns(models: dict[str, Any], run: Callable[[Any], None], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of the process."""
    draw = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name in draw.sample(list(models), len(models)):
            start = time.process_time()
            run(models[name])
            if turn:
                times[name].append(time.process_time() - start)
    return times
