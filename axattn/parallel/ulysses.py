"""DeepSpeed Ulysses (arXiv:2309.14509): attention of rows that are split over ranks, around any kernel.

Two all-to-alls: every rank sends each other rank its tokens of that rank's heads, runs the kernel on whole rows of its
own heads, and sends the output back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from axattn.errors import Reason, UnsupportedAttentionError
from axattn.masks.shard_mask import ShardMask
from axattn.parallel.collectives import exchange

_PER_HEAD = ("s_aux", "sinks")
_REFUSED = {
    "position_bias": "the model computes its position bias from the tokens of one rank",
    "indices": "the model selects keys among the tokens of one rank",
    "block_indices": "the model selects blocks of keys among the tokens of one rank",
}


def repeats(heads: int, kv_heads: int, ranks: int) -> int:
    """How often to repeat each KV head so that every rank gets the same number, with the matching query heads.

    The smallest r such that r x kv_heads is a multiple of `ranks` and a divisor of `heads` (a multiple of `ranks`).
    """
    least = math.lcm(kv_heads, ranks) // kv_heads
    return next(r for r in range(least, heads // kv_heads + 1, least) if heads % (r * kv_heads) == 0)


def reasons_against_call(kwargs: dict[str, Any]) -> list[Reason]:
    """Every reason why a call of attention can't run over ranks, among its keywords."""
    reasons = [Reason(keyword, text) for keyword, text in _REFUSED.items() if kwargs.get(keyword) is not None]
    if kwargs.get("output_attentions"):
        reasons.append(Reason("weights", "output_attentions=True (the weights of a row are on several ranks)"))
    return reasons


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer breaks its graph here
def over_ranks(
    attend: Callable[..., Any],
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: ShardMask,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Run `attend` on whole rows and this rank's heads.

    Args:
        attend: the attention function (`axattn.attention.interface.attend`).
        name: for `attend`.
        module: the attention module.
        query: this rank's tokens, ``[B, H, S / P, D]``.
        key: ``[B, Hkv, S / P, D]``.
        value: ``[B, Hkv, S / P, Dv]``.
        mask: of the call.
        kwargs: keywords of the call.

    Returns:
        ``[B, S / P, H, Dv]`` and None.

    Raises:
        UnsupportedAttentionError: the heads can't be divided, or the call has an input that needs whole rows.
    """
    shard = mask.shard
    P = shard.ranks
    B, H, part, D = query.shape
    reasons = reasons_against_call(kwargs)
    if any(isinstance(kwargs.get(word), torch.Tensor) and kwargs[word].ndim > 1 for word in _PER_HEAD):
        reasons.append(Reason("sinks", "the model computes its sinks from the tokens of one rank"))
    if key.shape[2] != part or part != shard.part or shard.rows != B:
        reasons.append(Reason("cross_lengths", "queries and keys are not this rank's part of the same rows"))
    if H % P:
        reasons.append(Reason("heads", f"{H} heads can't be divided among {P} ranks"))
    if reasons:
        raise UnsupportedAttentionError(f"{type(module).__name__} can't run over {P} ranks", reasons)
    repeat = repeats(H, key.shape[1], P)
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    sizes = [x.shape[1] // P * x.shape[3] for x in (query, key, value)]
    packed = torch.cat([_by_rank(x, P) for x in (query, key, value)], -1)
    received = exchange(packed, shard.group)  # [P, B, S / P, heads x dims of this rank]
    whole = received.transpose(0, 1).reshape(B, shard.length, -1)
    parts = torch.split(whole, sizes, -1)
    q, k, v = (
        x.reshape(B, shard.length, -1, dim).transpose(1, 2)
        for x, dim in zip(parts, (D, D, value.shape[3]), strict=True)
    )
    own = slice(shard.rank * (H // P), (shard.rank + 1) * (H // P))
    given = {word: x[own] if word in _PER_HEAD and x is not None else x for word, x in kwargs.items()}
    out, _ = attend(name, _stand_in(module, repeat, own), q, k, v, mask.whole_rows, **given)  # [B, S, H / P, Dv]
    back = out.reshape(B, P, part, -1).transpose(0, 1)
    own_tokens = exchange(back, shard.group)  # [P, B, S / P, H / P x Dv], by the rank that had the heads
    return own_tokens.permute(1, 2, 0, 3).reshape(B, part, H, -1), None


def _by_rank(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """``[B, heads, S, D]`` → ``[P, B, S, heads / P x D]``."""
    B, heads, S, D = x.shape
    return x.reshape(B, ranks, heads // ranks, S, D).permute(1, 0, 3, 2, 4).reshape(ranks, B, S, -1)


def _stand_in(module: torch.nn.Module, repeat: int, own: slice) -> torch.nn.Module:
    """The module as its eager function needs it: with this rank's sinks and the group size after repeating KV heads."""
    changed: dict[str, Any] = {}
    groups, sinks = getattr(module, "num_key_value_groups", None), getattr(module, "sinks", None)
    if repeat > 1 and isinstance(groups, int):
        changed["num_key_value_groups"] = groups // repeat
    if isinstance(sinks, torch.Tensor):
        changed["sinks"] = sinks[own]
    if not changed:
        return module
    stand: torch.nn.Module = object.__new__(type(module))
    stand.__dict__ = {**module.__dict__, **changed}
    return stand
