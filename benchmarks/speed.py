"""How near to the fastest that CPU attention can be: against a bound that is given the lengths, and padded batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from benchmarks.measure import in_random_turns, interleaved, ratios
from benchmarks.models import gemma2, llama, packed, step

_lengths: list[int] = []


def given_lengths(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Any, None]:
    """The bound: ``F.scaled_dot_product_attention(is_causal=True)`` on each document, given where they end."""
    import torch

    edges = [0, *torch.tensor(_lengths).cumsum(0).tolist()]
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
        )
        for a, b in pairwise(edges)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("given_lengths", given_lengths)
    AttentionMaskInterface.register("given_lengths", lambda **_: None)


def bound() -> dict[str, Any]:
    """A packed training step of a 20 M LLaMA: ``varlen``, Transformers' ``sdpa`` and the bound, in turn."""
    import torch

    import axattn

    _register()
    torch.set_num_threads(2)
    stock = llama(384, 8, 6, 8192)
    best, on_axattn = copy.deepcopy(stock), copy.deepcopy(stock)
    stock.set_attn_implementation("sdpa")
    best.set_attn_implementation("given_lengths")
    axattn.apply(on_axattn, "varlen")
    found: dict[str, Any] = {"aim": "varlen within 5 % of the bound; one document not below 0.98 x sdpa"}
    for tokens, documents, rounds in ((4096, 16, 3), (4096, 64, 3), (4096, 4, 2), (8192, 32, 2), (4096, 1, 3)):
        batch = packed(tokens, documents, 8192)
        _lengths[:] = [tokens // documents] * documents
        runs = {"sdpa": step(stock, batch), "bound": step(best, batch), "varlen": step(on_axattn, batch)}
        times = interleaved(runs, rounds, 1)
        print(tokens, documents, {name: [round(t, 2) for t in each] for name, each in times.items()}, flush=True)
        found[f"{tokens} tokens in {documents}"] = {
            "speedup": round(1 / ratios(times, "sdpa")["varlen"]["ratio"], 3),
            "bound's speedup": round(1 / ratios(times, "sdpa")["bound"]["ratio"], 3),
            "against the bound": ratios(times, "bound")["varlen"],
        }
    return found


def documents() -> dict[str, Any]:
    """A packed forward against Transformers' ``sdpa`` and ``flex_attention`` (whose CPU kernel has no backward)."""
    import torch

    import axattn

    torch.set_num_threads(2)
    stock = llama(384, 8, 6, 8192).eval()
    flex, on_axattn = copy.deepcopy(stock), copy.deepcopy(stock)
    stock.set_attn_implementation("sdpa")
    axattn.apply(flex, "flex_attention")
    axattn.apply(on_axattn, "varlen")

    def forward(model: Any, batch: dict[str, Any]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                model(**batch)

        return run

    found: dict[str, Any] = {"tokens": 4096}
    for length in (64, 256, 1024):
        batch = packed(4096, 4096 // length, 8192)
        models = {"sdpa": stock, "flex_attention": flex, "varlen": on_axattn}
        times = interleaved({name: forward(model, batch) for name, model in models.items()}, 3, 1)
        compared = ratios(times, "varlen")
        found[f"documents of {length}"] = {
            f"faster than {name}": round(compared[name]["ratio"], 3) for name in ("sdpa", "flex_attention")
        }
    return found


REAL = (512, 260, 190, 150, 120, 100, 110, 75)
"""Lengths of eight rows padded to 512 tokens: 37 % are real."""


def unpad() -> dict[str, Any]:
    """A training step on a padded batch, 37 % real tokens: ``unpad=True``, ``varlen`` and Transformers' ``sdpa``."""
    import torch

    import axattn

    torch.set_num_threads(2)
    ids = torch.randint(0, 8192, (len(REAL), max(REAL)))
    mask = (torch.arange(max(REAL))[None] < torch.tensor(REAL)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    found: dict[str, Any] = {"real tokens": round(mask.float().mean().item(), 3), "aim": ">= 2.8"}
    stock = llama(384, 8, 6, 8192)
    stock.set_attn_implementation("sdpa")
    whole, attention = copy.deepcopy(stock), copy.deepcopy(stock)
    axattn.apply(whole, "varlen", unpad=True)
    axattn.apply(attention, "varlen")
    for side in ("right", "left"):
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
        if side == "left":
            batch = {key: x.flip(1) if hasattr(x, "flip") else x for key, x in batch.items()}
        runs = {"sdpa": step(stock, batch), "unpad": step(whole, batch), "varlen": step(attention, batch)}
        compared = ratios(interleaved(runs, 4, 1), "sdpa")
        found[f"padded on the {side}"] = {name: round(1 / compared[name]["ratio"], 3) for name in ("unpad", "varlen")}
    return found


def fallback() -> dict[str, Any]:
    """A packed step of Gemma 2 (softcap: no varlen kernel serves it) and its documents as rows on eager; one thread.

    ``one dense mask`` is the same packed step if documents do not run by themselves. 4 layers of 256, 8 heads.
    """
    import torch

    import axattn
    from axattn.backends import by_document

    torch.set_num_threads(1)
    found: dict[str, Any] = {"tokens": 2048, "aim": "documents of 256: <= 1.15 of their time as rows"}

    def one_mask(run: Callable[[], None]) -> Callable[[], None]:
        def dense() -> None:
            before = by_document.CALL["cpu"]
            by_document.CALL["cpu"] = 1 << 60  # nothing pays
            try:
                run()
            finally:
                by_document.CALL["cpu"] = before

        return dense

    for length, dropout in ((256, 0.0), (256, 0.1), (64, 0.0)):
        stock = gemma2(256, 4, 8, 1024, window=128, dropout=dropout)
        on_axattn = axattn.apply(copy.deepcopy(stock), "auto")
        batch = packed(2048, 2048 // length, 1024)
        rows = {key: batch[key].view(-1, length) for key in ("input_ids", "labels")} | {"use_cache": False}
        runs = {
            "rows": step(stock, rows),
            "documents": step(on_axattn, batch),
            "one dense mask": one_mask(step(on_axattn, batch)),
        }
        compared = ratios(in_random_turns(runs, 5), "rows")
        found[f"documents of {length}" + (f", dropout {dropout}" if dropout else "")] = {
            name: compared[name] for name in ("documents", "one dense mask")
        }
    torch.set_num_threads(2)
    return found
