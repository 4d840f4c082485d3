"""``python -m tests.fuzz --examples 20000 --seed 7``: prints counts, and a script for each kind of failure."""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tqdm import tqdm

from tests.fuzz.strategies import chats, examples
from tests.fuzz.verdict import Verdict, run


def _kind(verdict: Verdict) -> str:
    return f"{verdict.status}: " + re.sub(r"\d[\d.]*(e[+-]\d+)?", "#", verdict.detail)[:160]


def main() -> int:
    """Exit status 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    asked = parser.parse_args()
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    shortest: dict[str, Any] = {}
    bar = tqdm(total=asked.examples, disable=not sys.stderr.isatty())

    @seed(asked.seed)
    @settings(
        max_examples=asked.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(examples(), examples(), chats()))
    def sweep(example: Any) -> None:
        verdict = run(example)
        bar.update()
        counts[verdict.status] += 1
        if not verdict.fine or verdict.status == "no oracle":
            kind = _kind(verdict)
            kinds[kind] += 1
            if kind not in shortest or len(repr(example)) < len(repr(shortest[kind])):
                shortest[kind] = example

    sweep()
    bar.close()
    print(f"seed {asked.seed}: " + ", ".join(f"{n} {status}" for status, n in counts.most_common()))
    for kind, n in kinds.most_common():
        print(f"\n{n} x {kind}\n    {shortest[kind].script}")
    return 1 if any(not kind.startswith("no oracle") for kind in kinds) else 0


if __name__ == "__main__":
    sys.exit(main())
