"""`bench_step`: times a whole packed training step of a model on each name."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from axattn import loading
from axattn.spec.names import canonicalise
from axattn.tools.bench.shapes import document_lengths
from axattn.tools.bench.timing import peak_bytes, ratio_of, timed


def bench_step(
    model: Any,
    names: Sequence[str],
    *,
    tokens: int = 2048,
    documents: int = 8,
    rounds: int = 3,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time training steps of a loaded model on each name, with the same packed row.

    Args:
        model: a loaded causal language model. It is restored afterwards.
        names: attention names; Transformers' ``sdpa`` runs first as the baseline (correct or not).
        tokens: tokens in the row.
        documents: documents in the row.
        rounds: timed steps per name.
        progress: called with each name before it runs.

    Returns:
        Per name: ``tokens_per_s``, ``ratio`` to ``sdpa`` with its quartiles
        ``ratio_low`` and ``ratio_high``, ``peak_bytes``; or ``failed`` with the reason.

    Raises:
        UnknownAttentionError: an unknown name.
    """
    names = [canonicalise(name) for name in names]
    device = next(model.parameters()).device
    lengths = document_lengths(tokens, max(tokens // documents, 1))
    where = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens)).to(device)

    def step() -> None:
        loss = model(ids, labels=ids, position_ids=where, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    found: dict[str, dict[str, Any]] = {}
    spent: dict[str, list[float]] = {}
    for name in ("sdpa", *(n for n in names if n != "sdpa")):
        if progress is not None:
            progress(name)
        try:
            with loading.using(model, name):
                step()
                found[name] = {"name": name, "peak_bytes": peak_bytes(step)}
            spent[name] = []
        except Exception as error:  # the benchmark continues; the reason is part of its result
            found[name] = {"name": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    for turn in range(rounds):
        for name, values in spent.items():
            if progress is not None:
                progress(f"{name}, round {turn + 1} of {rounds}")
            with loading.using(model, name):
                values.extend(timed({name: step}, 1, 1, device.type)[name])
    base = spent.get("sdpa")
    for name, values in spent.items():
        found[name]["tokens_per_s"] = round(tokens / statistics.median(values) * 1e3)
        each = [None if math.isnan(ratio) else round(ratio, 4) for ratio in ratio_of(values, base)]
        found[name].update(zip(("ratio", "ratio_low", "ratio_high"), each, strict=True))
    return list(found.values())
