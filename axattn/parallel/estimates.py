"""Memory and traffic per rank in sequence-parallel training, computed from a model's config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from axattn.errors import InvalidConfigError, InvalidInputError
from axattn.parallel.ulysses import repeats

ADAM_BYTES = 16
"""Per weight in mixed-precision Adam: 2 (bf16), 2 (gradient), 12 (fp32 copy, two moments): ZeRO, arXiv:1910.02054."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes per rank for one row of S tokens in bf16, with full gradient checkpointing.

    Attributes:
        tokens: S.
        ranks: P, the ranks that share a row.
        shards: ranks over which weights, gradients and optimizer states are split (FSDP), a multiple of P.
        states: weights, gradients and Adam's states.
        checkpoints: the inputs of all layers, kept for the backward.
        layer: the activations of one layer (hidden states, MLP, q, k, v and output before and after the exchange).
        logits: of this rank's tokens in fp32, with their gradient.
        sent: bytes that attention sends in one step (forward, recomputation, backward).
        mask: a dense bool mask of the row, for comparison; it is not built.
    """

    tokens: int
    ranks: int
    shards: int
    states: int
    checkpoints: int
    layer: int
    logits: int
    sent: int
    mask: int

    @property
    def total(self) -> int:
        """Bytes held at the peak."""
        return self.states + self.checkpoints + max(self.layer, self.logits)


def require_counts(given: Mapping[str, Any]) -> None:
    """Raise unless all values are positive integers.

    Raises:
        InvalidInputError: lists those that are not.
    """
    wrong = [f"{k}={v!r}" for k, v in given.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1]
    if wrong:
        raise InvalidInputError(f"{', '.join(wrong)}: give integers of 1 or more")


def estimate(config: Any, tokens: int, ranks: int, shards: int | None = None) -> Estimate:
    """The `Estimate` of a decoder.

    An all-to-all moves ``(P - 1) / P`` of a rank's tensor. A layer exchanges q, k, v and the output three times: in the
    forward, in its recomputation, and as gradients in the backward.

    Args:
        config: a decoder's config.
        tokens: S.
        ranks: P.
        shards: as in `Estimate`; P when None.

    Raises:
        InvalidInputError: not the config of a decoder; tokens, ranks or shards that are not positive integers.
        InvalidConfigError: the heads can't be divided among the ranks.
    """
    require_counts({"tokens": tokens, "ranks": ranks, "shards": ranks if shards is None else shards})
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        raise InvalidInputError(f"config is a {type(config).__name__}, not the config of a decoder")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % ranks:
        raise InvalidConfigError(f"{heads} heads can't be divided among {ranks} ranks")
    width, inner, layers, vocabulary = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
    )
    q, kv = heads * head_dim, kv_heads * head_dim
    weights = layers * (2 * width * q + 2 * width * kv + 3 * width * inner + 2 * width)
    weights += vocabulary * width * (1 if getattr(config, "tie_word_embeddings", False) else 2) + width
    part = math.ceil(tokens / ranks)
    exchanged = q + 2 * kv * repeats(heads, kv_heads, ranks) + q
    return Estimate(
        tokens=tokens,
        ranks=ranks,
        shards=shards or ranks,
        states=weights * ADAM_BYTES // (shards or ranks),
        checkpoints=layers * part * width * 2,
        layer=part * 2 * (2 * width + 3 * inner + 2 * exchanged) * 2,  # with gradients
        logits=part * vocabulary * 4 * 2,
        sent=layers * 3 * part * exchanged * 2 * (ranks - 1) // ranks,
        mask=tokens * tokens,
    )


def table(config: Any, lengths: tuple[int, ...], machines: tuple[int, ...]) -> str:
    """A Markdown table of estimates: each row on as many ranks as the heads allow, weights split over all GPUs.

    Args:
        config: a decoder's config.
        lengths: tokens per row.
        machines: numbers of GPUs.
    """
    head = (
        "tokens|GPUs|share a row|tokens a GPU|weights, gradients, Adam|checkpoints|a layer, or logits|held|sent a step"
    )
    lines = [f"| {head.replace('|', ' | ')} |", "|" + "---|" * len(head.split("|"))]
    for tokens in lengths:
        for gpus in machines:
            ranks = math.gcd(config.num_attention_heads, gpus)
            one = estimate(config, tokens, ranks, gpus)
            sizes = [one.states, one.checkpoints, max(one.layer, one.logits), one.total, one.sent]
            shown = " | ".join(f"{size / 2**30:,.1f} GiB" for size in sizes)
            lines.append(f"| {tokens:,} | {gpus} | {ranks} | {tokens // ranks:,} | {shown} |")
    return "\n".join(lines)
