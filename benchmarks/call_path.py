"""What axattn costs beside Transformers' ``sdpa`` where it computes the same: forwards and steps on 16 tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from operator import truediv
from typing import Any

from benchmarks.measure import in_random_turns, ratios
from benchmarks.models import llama


def tiny_forward(forwards: int = 4000) -> dict[str, Any]:
    """One forward of 4 or 32 layers, by the inputs: CPU time through ``varlen`` against Transformers' ``sdpa``."""
    import copy

    import torch

    import axattn

    found: dict[str, Any] = {"aim": "<= 1.00"}
    torch.set_num_threads(1)
    ids = torch.randint(0, 128, (1, 16))
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "no cache": {"use_cache": False},
        "all-ones mask": {"attention_mask": torch.ones_like(ids)},
        "positions": {"position_ids": torch.arange(16)[None], "use_cache": False},
    }
    for layers in (4, 32):
        stock = llama(64, layers, 4, 128).eval()
        stock.set_attn_implementation("sdpa")
        models = {"sdpa": stock, "varlen": axattn.apply(copy.deepcopy(stock), "varlen")}
        again = {"sdpa": stock, "sdpa again": copy.deepcopy(stock)}
        for kind, inputs in kinds.items():
            compared = _compared(models, ids, inputs, forwards // layers)["varlen"]
            noise = _compared(again, ids, inputs, forwards // layers)["sdpa again"]["ratio"]
            found[f"{layers} layers, {kind}"] = {**compared, "sdpa against itself": noise}
    return found


def _compared(models: dict[str, Any], ids: Any, inputs: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """`ratios` of forwards to those of ``sdpa``."""
    runs = {name: _forward(model, ids, inputs) for name, model in models.items()}
    return ratios(in_random_turns(runs, rounds, 5), "sdpa")


def call_path(rounds: int = 1000) -> dict[str, Any]:
    """CPU time of forwards and of steps with gradients, of 4 layers: a stock model and two of axattn's in random turns,
    then the stock model and a copy of it (the noise).

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
    for what, of in (("forwards", _without_cache), ("steps", _step)):
        found[what] = {
            name: speed
            for together in (models, again)
            for name, speed in _speeds({name: of(model, ids) for name, model in together.items()}, rounds).items()
        }
    return found


def _speeds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Relative to ``sdpa`` in the same round: the machine's own speed changes over a run."""
    times = in_random_turns(runs, rounds, 5)
    base = times.pop("sdpa")
    return {name: round(statistics.median(map(truediv, base, values)), 3) for name, values in times.items()}


def _forward(model: Any, ids: Any, inputs: dict[str, Any]) -> Callable[[], object]:
    import torch

    def run() -> None:
        with torch.no_grad():
            model(ids, **inputs)

    return run


def _without_cache(model: Any, ids: Any) -> Callable[[], object]:
    return _forward(model, ids, {"use_cache": False})


def _step(model: Any, ids: Any) -> Callable[[], object]:
    def run() -> None:
        model(ids, use_cache=False).logits.sum().backward()
        model.zero_grad(set_to_none=True)

    return run
