"""Attention sinks: a packed training step of a small gpt-oss on ``auto``, on eager, and on ``auto`` without sinks."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.models import packed, step

TOKENS, DOCUMENT, VOCABULARY = 2048, 256, 1024


def gpt_oss(hidden: int = 256, layers: int = 2, heads: int = 8, kv_heads: int = 2, window: int = 128) -> Any:
    """A seeded gpt-oss with 4 small experts, head dim 64; windowed and full layers in turn."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        max_position_embeddings=1 << 14,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    )
    return GptOssForCausalLM(config)


def without_sinks(model: Any) -> None:
    """Have the attention layers pass no sinks."""
    for layer in model.model.layers:
        layer.self_attn.sinks = None


def cpu_seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of this thread for each call; every round takes the candidates in a new random order."""
    order = random.Random(0)  # no secret
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            start = time.thread_time()
            runs[name]()
            times[name].append(time.thread_time() - start)
    return times


def sinks() -> dict[str, Any]:
    """A packed training step: 2,048 tokens in documents of 256, windowed and full layers."""
    import torch

    import axattn

    torch.set_num_threads(1)
    models = {"eager": gpt_oss()}
    models["auto"], models["auto without sinks"] = copy.deepcopy(models["eager"]), copy.deepcopy(models["eager"])
    models["eager"].set_attn_implementation("eager")
    axattn.apply(models["auto"], "auto")
    without_sinks(models["auto without sinks"])
    axattn.apply(models["auto without sinks"], "auto")
    batch = packed(TOKENS, TOKENS // DOCUMENT, VOCABULARY)
    found: dict[str, Any] = {"aim": "eager >= 4.5 x auto; auto <= 1.05 x the same step without sinks"}
    times = cpu_seconds({name: step(model.train(), batch) for name, model in models.items()}, 9)
    for name, values in times.items():
        each = [value / own for value, own in zip(values, times["auto"], strict=True)]
        found[name] = {"best_ms": round(min(values) * 1e3, 1), "times auto": round(statistics.median(each), 3)}
    return found
