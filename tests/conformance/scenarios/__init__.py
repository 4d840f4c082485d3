"""The scenarios of the matrix: what is asked of a model, what eager gives on each document alone, and the tolerance."""

from tests.conformance.scenarios import rows, gradients, ranks, decoding, options, seq2seq, compiled  # noqa: I001  # their order is the tables'
from tests.conformance.scenarios.base import SCENARIOS, Scenario

__all__ = ["SCENARIOS", "Scenario", "compiled", "decoding", "gradients", "options", "ranks", "rows", "seq2seq"]
