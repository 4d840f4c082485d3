"""What became of each test on `auto` and on Transformers' attention, side by side, and what is said of the difference.

Pure functions of outcomes; `judged.py` holds the judgements.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Result = Literal["passed", "skipped", "failed"]
Verdict = Literal["passed", "refused", "by design", "not compared", "unjudged refusal", "wrong"]
BAD: tuple[Verdict, ...] = ("unjudged refusal", "wrong")


@dataclass(frozen=True)
class Outcome:
    """What became of one test.

    Attributes:
        test: ``TestClass::test_name``.
        result: as pytest says.
        refused: an `AxattnError` is the failure's cause.
        text: of the failure, or why it was skipped.
        placed: how many models the test put on `auto`.
    """

    test: str
    result: Result
    refused: bool = False
    text: str = ""
    placed: int = 0


@dataclass(frozen=True)
class Judgement:
    """A difference that was looked at and found right.

    Attributes:
        test: a pattern of ``TestClass::test_name``.
        text: a pattern of what the failure says.
        why: why it is right.
    """

    test: str
    text: str
    why: str

    def covers(self, outcome: Outcome) -> bool:
        """Whether the outcome is one that was judged."""
        return bool(re.search(self.test, outcome.test) and re.search(self.text, outcome.text, re.DOTALL))


@dataclass(frozen=True)
class Comparison:
    """One test on both.

    Attributes:
        test: as in `Outcome`.
        verdict: ``"passed"`` on `auto`, or what its failing there means; ``"not compared"`` if it does not pass on
            Transformers' attention either.
        why: why a difference is right, or what failed.
    """

    test: str
    verdict: Verdict
    why: str = ""


def write(outcomes: Iterable[Outcome]) -> str:
    """Outcomes as lines of JSON."""
    return "".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)


def read(text: str) -> dict[str, Outcome]:
    """Outcomes by test, from lines of JSON."""
    found = [Outcome(**json.loads(line)) for line in text.splitlines() if line]
    return {outcome.test: outcome for outcome in found}


def not_passed(outcomes: Mapping[str, Outcome]) -> list[str]:
    """The tests that must be run on Transformers' attention, too."""
    return [test for test, outcome in outcomes.items() if outcome.result != "passed"]


def compare(
    auto: Mapping[str, Outcome],
    stock: Mapping[str, Outcome],
    refusals: Sequence[Judgement],
    by_design: Sequence[Judgement],
) -> list[Comparison]:
    """What `auto` makes of each test: it passes, or does not on Transformers' attention either, or the difference is
    judged, or it is wrong.

    Args:
        auto: every test.
        stock: on Transformers' attention, at least those that do not pass on `auto`.
        refusals: refusals whose reason is true.
        by_design: other differences that are right.
    """
    return [_one(outcome, stock.get(test), refusals, by_design) for test, outcome in auto.items()]


def _one(
    auto: Outcome, stock: Outcome | None, refusals: Sequence[Judgement], by_design: Sequence[Judgement]
) -> Comparison:
    if auto.result == "passed":
        return Comparison(auto.test, "passed")
    if stock is None:
        return Comparison(auto.test, "wrong", f"{auto.result}, and not run on Transformers' attention: {auto.text}")
    if stock.result != "passed":
        return Comparison(auto.test, "not compared", f"{stock.result} on Transformers' attention: {stock.text}")
    judged = next((j for j in (refusals if auto.refused else by_design) if j.covers(auto)), None)
    if judged is not None:
        return Comparison(auto.test, "refused" if auto.refused else "by design", judged.why)
    return Comparison(auto.test, "unjudged refusal" if auto.refused else "wrong", f"{auto.result}: {auto.text}")


def summary(auto: Mapping[str, Outcome], compared: Sequence[Comparison]) -> tuple[str, list[str]]:
    """A line of counts, and every finding that fails the run.

    A family of which no test passed, or no model was put on `auto`, has shown nothing: that fails, too.
    """
    counts = Counter(one.verdict for one in compared)
    placed = sum(outcome.placed for outcome in auto.values())
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    bad = [f"{one.verdict}: {one.test}: {one.why}" for one in compared if one.verdict in BAD]
    if not counts["passed"] or not placed:
        bad.append(f"nothing was shown: {counts['passed']} tests passed, {placed} models were put on auto")
    return f"{shown or 'no tests'}; {placed} models on auto", bad
