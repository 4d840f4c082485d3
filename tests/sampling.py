"""How much of the sweeps a run of the tests takes. No test lives here."""

from __future__ import annotations

import os

THIN = os.environ.get("AXATTN_SAMPLE") == "thin"
"""A thin slice of matrix and census (`make newest`)."""
