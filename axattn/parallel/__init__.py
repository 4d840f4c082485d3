"""Sequence parallelism around any kernel: rows split over ranks, heads exchanged for tokens inside attention.

`sequence_parallel` turns it on for a model; `accelerate_config` builds the ``ParallelismConfig`` of accelerate for it;
`estimate` tells what a rank holds and sends.
"""

from axattn.parallel.accelerate import accelerate_config
from axattn.parallel.collectives import average_gradients
from axattn.parallel.estimates import Estimate, estimate
from axattn.parallel.model import sequence_parallel

__all__ = ["Estimate", "accelerate_config", "average_gradients", "estimate", "sequence_parallel"]
