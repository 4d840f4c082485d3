"""``python -m tests.upstream``: Transformers' own tests on `auto`: what passes on stock passes or is refused."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers

from tests.upstream import outcomes, sources
from tests.upstream.families import FAMILIES
from tests.upstream.judged import BY_DESIGN, REFUSALS

ROOT = Path(__file__).parents[2]
SUITE = "tests/upstream/suite.py"
MINUTES = 30


def main() -> int:
    """Run; 1 if anything is wrong, 2 if Transformers' tests can't be had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help=f"only these of {', '.join(FAMILIES)}")
    parser.add_argument("--source", type=Path, help="a checkout of Transformers, instead of its source package")
    parser.add_argument("-k", dest="pattern", default="", help="only tests that match, as for pytest")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.family if name not in FAMILIES]
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    try:
        found = sources.prepare(transformers.__version__, arguments.source)
    except sources.SourcesError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Transformers {transformers.__version__}: tests of {found.path[0].name}")
    if found.absent:
        print(f"not in it, so not run (a checkout has them: --source): {', '.join(found.absent)}")
    wrong = 0
    for name in arguments.family or FAMILIES:
        wrong += _report(name, found, ["-k", arguments.pattern] if arguments.pattern else [])
    print(f"{wrong} wrong" if wrong else "Nothing is wrong.")
    return int(wrong > 0)


def _report(name: str, found: sources.Sources, chosen: Sequence[str]) -> int:
    """Run one family and print what it showed; how much of it is wrong."""
    try:
        auto = _run(name, "auto", found, [SUITE, *chosen])
        again = outcomes.not_passed(auto)
        stock = _run(name, "stock", found, [f"{SUITE}::{test}" for test in again]) if again else {}
    except RuntimeError as error:
        print(f"{name}: {error}")
        return 1
    compared = outcomes.compare(auto, stock, REFUSALS, BY_DESIGN)
    summary, bad = outcomes.summary(auto, compared)
    print(f"{name}: {summary}", flush=True)
    for line in bad:
        print(f"  {line}")
    return len(bad)


def _run(name: str, on: str, found: sources.Sources, tests: Sequence[str]) -> Mapping[str, outcomes.Outcome]:
    """Outcomes of a family's tests, run in a process of its own.

    Raises:
        RuntimeError: pytest did not come to an end; with what it said last.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-p", "tests.upstream.plugin", "--disable-warnings", "--tb=no", *tests]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.jsonl"
        chosen = {"AXATTN_UPSTREAM_FAMILY": name, "AXATTN_UPSTREAM_ON": on, "AXATTN_UPSTREAM_OUTCOMES": str(file)}
        environment = sources.environment(found) | chosen
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60 * MINUTES, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the tests on {on} took more than {MINUTES} minutes") from None
        if done.returncode not in (0, 1, 5) or not file.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} on {on}: {(done.stdout + done.stderr)[-2000:]}")
        return outcomes.read(file.read_text())


if __name__ == "__main__":
    sys.exit(main())
