"""`axattn.parallel.estimate` with documents: which strategy, and why."""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from axattn.errors import InvalidConfigError, InvalidInputError
from axattn.parallel import estimate
from axattn.parallel.estimates import documents_table
from tests.models import CONFIGS
from tests.parallel.test_sequence_parallel import big
from tests.sampling import SAMPLE


def log_normal(tokens: int, median: int) -> list[int]:
    """Lengths at even quantiles of a log-normal distribution, sigma 1, that fill a row."""
    count = round(tokens / (median * exp(0.5)))
    raw = [exp(log(median) + NormalDist().inv_cdf((at + 0.5) / count)) for at in range(count)]
    found = [max(round(length * tokens / sum(raw)), 1) for length in raw]
    found[-1] += tokens - sum(found)
    return found


ROWS = {"one": [131_072], **{f"about {n:,} tokens": log_normal(131_072, n) for n in (8_000, 1_000)}}


def test_the_page_s_tables_of_strategies_are_those_of_the_formulas() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "parallel.md").read_text()
    for config in [big(32, 32, 4096, 14336), big(80, 64, 8192, 28672)][: 2 if SAMPLE == "nightly" else 1]:
        assert documents_table(config, (8, 64), ROWS) in page


def test_auto_takes_what_sends_less_and_says_why() -> None:
    config = big(2, 32, 4096, 14336)
    one, short = estimate(config, 8192, 8), estimate(config, 8192, 8, documents=[1024] * 8)
    assert (one.strategy, short.strategy) == ("ulysses", "fetch")
    assert one.sent == estimate(config, 8192, 8, strategy="ulysses").sent
    assert short.sent == 0
    assert short.why.startswith("fetching keys moves 0.0 GiB a step, exchanging heads")
    fetched = estimate(config, 8192, 8, strategy="fetch")
    assert fetched.sent > one.sent
    assert fetched.layer > one.layer
    assert fetched.why == "as asked"
    odd = estimate(config, 8192, 7)
    assert (odd.strategy, odd.why) == ("fetch", "32 heads can't be divided among 7 ranks")
    with pytest.raises(InvalidConfigError, match="fetch"):
        estimate(config, 8192, 7, strategy="ulysses")


def test_windows_of_a_config_count() -> None:
    config: Any = CONFIGS["mistral"]()
    config.sliding_window = 16
    narrow = estimate(config, 512, 2, strategy="fetch")
    config.sliding_window = None
    assert narrow.sent < estimate(config, 512, 2, strategy="fetch").sent / 4


def test_bad_input() -> None:
    config = CONFIGS["llama"]()
    with pytest.raises(InvalidInputError, match="the documents have 60 tokens, the row has 64"):
        estimate(config, 64, 2, documents=[30, 30])
    with pytest.raises(InvalidInputError, match=r"documents\[1\]=0"):
        estimate(config, 64, 2, documents=[64, 0])
    with pytest.raises(InvalidInputError, match="strategy='ring' is not one of"):
        estimate(config, 64, 2, strategy="ring")  # type: ignore[arg-type]  # bad input
