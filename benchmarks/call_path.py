"""What axattn costs beside Transformers' ``sdpa`` where it computes the same: two patched models beside a stock one."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from operator import truediv
from typing import Any

from benchmarks.models import llama


def call_path(rounds: int = 1000) -> dict[str, Any]:
    """CPU time of forwards, and of steps with gradients, of 4 layers on 16 tokens: a stock model and two of axattn's in
    random turns, then the stock model and a copy of it (the noise).

    The speeds are relative to the stock model's (1: as fast), medians over rounds. The second model shares masks with
    the first.
    """
    import copy

    import torch

    import axattn

    torch.set_num_threads(1)
    ids = torch.randint(0, 128, (1, 16))
    stock = llama(64, 4, 4, 128).eval()
    stock.set_attn_implementation("sdpa")
    models = {"sdpa": stock, "first": axattn.apply(copy.deepcopy(stock), "auto")}
    models |= {"second": axattn.apply(copy.deepcopy(stock), "varlen")}
    again = {"sdpa": stock, "sdpa again": copy.deepcopy(stock)}
    found: dict[str, Any] = {"aim": "forwards >= 0.98, steps >= 0.95, of both"}

    def forward(model: Any) -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def step(model: Any) -> None:
        model(ids, use_cache=False).logits.sum().backward()
        model.zero_grad(set_to_none=True)

    for what, run in (("forwards", forward), ("steps", step)):
        found[what] = _speeds(_in_random_turns(models, run, rounds)) | _speeds(_in_random_turns(again, run, rounds))
    return found


def _speeds(times: dict[str, list[float]]) -> dict[str, float]:
    """Relative to ``sdpa`` in the same round: the machine's own speed changes over a run."""
    return {
        name: round(statistics.median(map(truediv, times["sdpa"], values)), 3)
        for name, values in times.items()
        if name != "sdpa"
    }


def _in_random_turns(models: dict[str, Any], run: Callable[[Any], None], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of this thread."""
    draw = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 5):
        for name in draw.sample(list(models), len(models)):
            start = time.thread_time()
            run(models[name])
            if turn >= 5:
                times[name].append(time.thread_time() - start)
    return times
