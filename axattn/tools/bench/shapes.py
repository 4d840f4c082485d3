"""`Shape`: an attention shape to benchmark, from the command line or a model's config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from axattn import loading
from axattn.errors import InvalidConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention shape.

    Attributes:
        rows: B.
        heads: H.
        kv_heads: Hkv.
        length: S.
        head_dim: D.
        documents: lengths of the documents of a packed row (B is 1), None for dense rows.
        window: sliding window, None for full attention.
    """

    rows: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    documents: tuple[int, ...] | None = None
    window: int | None = None

    @classmethod
    def parse(cls, text: str, documents: int | None = None) -> Shape:
        """Parse ``B,H,Hkv,S,D``, with the number of packed documents.

        Raises:
            InvalidConfigError: not five positive numbers, or H is not a multiple of Hkv.
        """
        try:
            rows, heads, kv_heads, length, size = (int(part) for part in text.split(","))
        except ValueError:
            raise InvalidConfigError(
                f"--shape {text!r} is not B,H,Hkv,S,D", advice="For example 1,32,8,8192,128."
            ) from None
        if min(rows, heads, kv_heads, length, size) < 1 or heads % kv_heads:
            raise InvalidConfigError(
                f"--shape {text!r} is invalid", advice="H must be a multiple of Hkv; all must be > 0."
            )
        return cls(rows, heads, kv_heads, length, size).packed(documents)

    def packed(self, documents: int | None) -> Shape:
        """The same tokens as one packed row of this many documents of log-normal lengths."""
        if not documents:
            return self
        tokens = self.rows * self.length
        lengths = tuple(document_lengths(tokens, max(tokens // documents, 1)))
        return Shape(1, self.heads, self.kv_heads, tokens, self.head_dim, lengths, self.window)

    def flops(self) -> float:
        """FLOPs of the causal forward."""
        pairs = 0.0
        for size in self.documents or (self.length,) * self.rows:
            span = min(size, self.window or size)
            pairs += span * (span + 1) / 2 + (size - span) * span
        return 4 * self.heads * self.head_dim * pairs

    def __str__(self) -> str:
        kind = f", {len(self.documents)} documents" if self.documents else ""
        kind += f", window {self.window}" if self.window else ""
        return f"B {self.rows}, H {self.heads}/{self.kv_heads}, S {self.length}, D {self.head_dim}{kind}"


def document_lengths(tokens: int, mean: int, seed: int = 0) -> list[int]:
    """Log-normal document lengths with the sum `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while (left := tokens - sum(found)) > 0:
        drawn = int(math.exp(math.log(mean) + 0.6 * float(torch.randn(1, generator=generator))))
        found.append(min(max(drawn, 1), left))
    return found


def shapes_of(model: Any, seq_len: int, documents: int | None = None) -> list[Shape]:
    """The distinct attention shapes of a model's layers, from its config.

    Raises:
        InvalidConfigError: its config does not describe causal attention.
    """
    plan = loading.plan(model, "auto")
    found = []
    for entry in plan.layers:
        need = entry.layer.need
        if need.heads and need.head_dim and need.causal:
            window = need.window if need.window is not None and need.window < seq_len else None
            shape = Shape(1, need.heads, need.kv_heads or need.heads, seq_len, need.head_dim, None, window)
            found.append(shape.packed(documents))
    if not found:
        raise InvalidConfigError(f"the config of {plan.model} does not describe causal attention")
    return list(dict.fromkeys(found))
