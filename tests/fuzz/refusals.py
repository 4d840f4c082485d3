"""Refusals that are true although stock eager attention is right on the same inputs: what, and when it may be said."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.fuzz.chat import Chat
from tests.fuzz.example import Example


def _unpads(example: Example | Chat) -> bool:
    return isinstance(example, Example) and example.unpad


def _lacks(name: str, *families: str) -> Callable[[Example | Chat], bool]:
    def holds(example: Example | Chat) -> bool:
        runs = {example.name, "varlen" if "apply again" in getattr(example, "steps", ()) else ""}
        return name in runs and example.family in families

    return holds


def _packs(example: Example | Chat) -> bool:
    return example.name in ("eager", "sdpa") and example.packed


def _counts_padding(example: Example | Chat) -> bool:
    """In cu_seq_lens, padding at a row's end looks like a document of its own."""
    return isinstance(example, Example) and example.described_by == "lengths" and example.pads


TRUE: tuple[tuple[str, Callable[[Example | Chat], bool]], ...] = (
    ("unpad=True can't serve .*: eager is called by Transformers", lambda e: _unpads(e) and e.name == "eager"),
    ("unpad=True can't serve .*: sdpa is called by Transformers", lambda e: _unpads(e) and e.name == "sdpa"),
    (r"unpad=True can't serve .*: it takes images", lambda e: _unpads(e) and e.family in ("qwen2_5_vl", "gemma3_vl")),
    (r"would leak on (eager|sdpa)", lambda e: isinstance(e, Chat) and _packs(e)),  # its cache is on
    (r"would leak on (eager|sdpa)", lambda e: e.name in ("eager", "sdpa") and _counts_padding(e)),
    (r"varlen has no softcap", _lacks("varlen", "gemma2")),
    (r"sdpa has no softcap", _lacks("sdpa", "gemma2")),
    (r"sdpa has no attention sinks", _lacks("sdpa", "gpt_oss")),
)
"""(a pattern of the message, whether it is true of an example)."""


def is_true(example: Example | Chat, message: str) -> bool:
    """Whether a refusal is one of those listed."""
    return any(re.search(pattern, message) and holds(example) for pattern, holds in TRUE)
