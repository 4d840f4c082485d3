"""``python -m tests.canary``: what contracts and canary say of the installed versions; 1 if anything is wrong."""

from __future__ import annotations

import sys

import accelerate  # noqa: F401  # contracts are checked of what is imported
import peft  # noqa: F401

import axattn
from axattn.hf import canary, contracts


def main() -> int:
    """Print every finding; 1 if one is wrong."""
    found = contracts.findings()
    for finding in found:
        print(finding.text)
    outcomes = canary.run(axattn.apply)
    for scenario, text in outcomes.items():
        print(f"canary, {scenario}: {text or 'right'}")
    return int(any(finding.different for finding in found) or any(outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
