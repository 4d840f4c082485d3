"""Sequence parallelism around any kernel: rows are split over ranks.

Attention exchanges tokens for heads (Ulysses) or fetches the keys and values that its queries attend to.

`sequence_parallel` turns it on for a model; `accelerate_config` builds accelerate's ``ParallelismConfig`` for it;
`estimate` computes memory and traffic per rank.
"""

from axattn.parallel.accelerate import accelerate_config
from axattn.parallel.collectives import average_gradients
from axattn.parallel.estimates import Estimate, estimate
from axattn.parallel.model import sequence_parallel

__all__ = ["Estimate", "accelerate_config", "average_gradients", "estimate", "sequence_parallel"]
