"""Memory and traffic per rank in sequence-parallel training, computed from a model's config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from axattn.documents.placement import Document, place
from axattn.errors import InvalidConfigError, InvalidInputError
from axattn.parallel.fetch_plan import fetched
from axattn.parallel.strategy import (
    LayerSizes,
    Strategy,
    fetch_values,
    layer_sizes,
    require_strategy,
    ulysses_values,
)
from axattn.parallel.ulysses import repeats
from axattn.traits.layer_needs import model_needs

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
        layer: the activations of one layer (hidden states, MLP, q, k, v and output before and after the exchange, or
            fetched keys and values).
        logits: of this rank's tokens in fp32, with their gradient.
        sent: bytes that attention sends in one step (forward, recomputation, backward), or the busiest rank receives.
        mask: a dense bool mask of the row, for comparison; it is not built.
        strategy: ``"ulysses"`` or ``"fetch"``, as `axattn.sequence_parallel` takes it for these documents.
        why: the reason, a sentence.
        imbalance: attention work of the busiest rank over the mean.
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
    strategy: str = "ulysses"
    why: str = ""
    imbalance: float = 1.0

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


def estimate(
    config: Any,
    tokens: int,
    ranks: int,
    shards: int | None = None,
    *,
    documents: Sequence[int] | None = None,
    strategy: Strategy = "auto",
) -> Estimate:
    """The `Estimate` of a decoder.

    An all-to-all moves ``(P - 1) / P`` of a rank's tensor. With ``"ulysses"`` a layer exchanges q, k, v and the output,
    with ``"fetch"`` the keys and values that the queries of other ranks attend to, each three times: in the forward, in
    its recomputation, and as gradients in the backward.

    Args:
        config: a decoder's config.
        tokens: S.
        ranks: P.
        shards: as in `Estimate`; P when None.
        documents: lengths of the row's documents, which add up to S; None for one document.
        strategy: as for `axattn.sequence_parallel`.

    Raises:
        InvalidInputError: not the config of a decoder; tokens, ranks or shards that are not positive integers;
            documents that don't add up; an unknown strategy.
        InvalidConfigError: the heads can't be divided among the ranks, with ``strategy="ulysses"``.
    """
    require_counts({"tokens": tokens, "ranks": ranks, "shards": ranks if shards is None else shards})
    lengths = [tokens] if documents is None else list(documents)
    require_counts({f"documents[{at}]": length for at, length in enumerate(lengths)})
    if sum(lengths) != tokens:
        raise InvalidInputError(f"the documents have {sum(lengths)} tokens, the row has {tokens}")
    require_strategy(strategy)
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        raise InvalidInputError(f"config is a {type(config).__name__}, not the config of a decoder")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
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
    found = layer_sizes(entry.need for entry in model_needs(config).layers)
    taken = _taken(found or [LayerSizes(heads, kv_heads, head_dim, head_dim)] * layers, part, ranks, lengths, strategy)
    if taken.strategy == "ulysses":
        moved = 2 * part * 2 * (q + kv * repeats(heads, kv_heads, ranks))  # before and after
    else:
        moved = part * 2 * (q + kv) + 2 * (part + taken.keys) * 2 * kv  # own and fetched ones, gathered by document
    return Estimate(
        tokens=tokens,
        ranks=ranks,
        shards=shards or ranks,
        states=weights * ADAM_BYTES // (shards or ranks),
        checkpoints=layers * part * width * 2,
        layer=(part * (2 * width + 3 * inner) + moved) * 2 * 2,  # with gradients
        logits=part * vocabulary * 4 * 2,
        sent=3 * taken.values * 2,
        mask=tokens * tokens,
        strategy=taken.strategy,
        why=taken.why,
        imbalance=taken.imbalance,
    )


class _Taken(NamedTuple):
    strategy: str
    why: str
    values: int
    keys: int = 0
    imbalance: float = 1.0


def _taken(sizes: list[LayerSizes], part: int, ranks: int, lengths: list[int], strategy: Strategy) -> _Taken:
    """The strategy for a row of documents, and the values that it moves in a forward.

    Raises:
        InvalidConfigError: the heads can't be divided among the ranks, as ``"ulysses"`` needs.
    """
    odd = next((layer.heads for layer in sizes if layer.heads % ranks), None)
    uneven = f"{odd} heads can't be divided among {ranks} ranks"
    if odd is not None and strategy == "ulysses":
        raise InvalidConfigError(uneven, advice='Take strategy="fetch".')
    exchanged = 0 if odd is not None else ulysses_values(sizes, part, ranks)
    if strategy == "ulysses":
        return _Taken("ulysses", "as asked", exchanged)
    edges = list(accumulate(lengths, initial=0))
    placed = place([Document((edge,)) for edge in pairwise(edges)], edges[-1], ranks)
    values = fetch_values(sizes, placed)
    keys = max(max(map(len, fetched(placed, layer.rule))) for layer in sizes)
    fetching = _Taken("fetch", "as asked", values, keys, placed.imbalance)
    if strategy == "fetch":
        return fetching
    if odd is not None:
        return fetching._replace(why=uneven)
    shown = [f"{3 * 2 * number / 2**30:,.1f} GiB a step" for number in (values, exchanged)]
    if values < exchanged:
        return fetching._replace(why=f"fetching keys moves {shown[0]}, exchanging heads {shown[1]}")
    return _Taken("ulysses", f"exchanging heads moves {shown[1]}, fetching keys {shown[0]}", exchanged)


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
            one = estimate(config, tokens, ranks, gpus, strategy="ulysses")
            sizes = [one.states, one.checkpoints, max(one.layer, one.logits), one.total, one.sent]
            shown = " | ".join(f"{size / 2**30:,.1f} GiB" for size in sizes)
            lines.append(f"| {tokens:,} | {gpus} | {ranks} | {tokens // ranks:,} | {shown} |")
    return "\n".join(lines)


def documents_table(config: Any, machines: tuple[int, ...], rows: Mapping[str, Sequence[int]]) -> str:
    """A Markdown table of what each strategy sends in a step.

    Args:
        config: a decoder's config.
        machines: numbers of ranks that share a row.
        rows: lengths of a row's documents, by a name for them.
    """
    names = "share a row|documents|exchanging heads|fetching keys|work of the busiest rank|`auto` takes"
    lines = [f"| {names.replace('|', ' | ')} |", "|" + "---|" * len(names.split("|"))]
    for ranks in machines:
        for name, documents in rows.items():
            fetch = estimate(config, sum(documents), ranks, documents=documents, strategy="fetch")
            auto = estimate(config, sum(documents), ranks, documents=documents)
            heads = "the heads don't allow it"
            if config.num_attention_heads % ranks == 0:
                heads = f"{estimate(config, sum(documents), ranks, strategy='ulysses').sent / 2**30:,.1f} GiB"
            sent = f"{fetch.sent / 2**30:,.1f} GiB"
            cells = [str(ranks), name, heads, sent, f"{fetch.imbalance:.2f} x mean", f"`{auto.strategy}`"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
