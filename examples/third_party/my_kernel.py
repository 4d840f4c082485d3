"""A third party's kernel: a record, a probe and a forward. See docs/adding-a-backend.md."""

import torch

from axattn.backends.base import Backend, check_library
from axattn.spec.capability import Capability


def forward(call):
    """Plain attention over a dense mask: ``AttentionCall`` → ``[B, S, H, D]``."""
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (call.key, call.value))
    logits = call.query @ key.transpose(-1, -2) * call.scale
    mask = call.dense_mask()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return (logits.softmax(-1).nan_to_num() @ value).transpose(1, 2)


def probe(environment):
    """Why a machine can't run it."""
    reasons = []
    check_library(reasons, "torch", "torch", environment, "pip install -U torch", "2.11")
    return reasons


CAPABILITY = Capability(
    devices=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({"float32", "bfloat16"}),
    **dict.fromkeys(["grouped_heads", "causal", "bidirectional", "window", "padding", "segments"], True),
    **dict.fromkeys(["dense_mask", "non_contiguous_padding", "cross_lengths", "gradient", "deterministic"], True),
)
BACKEND = Backend("my_kernel", "an example", CAPABILITY, probe, forward)
