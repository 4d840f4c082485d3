"""Attention of tokens that are placed on ranks by document: every rank fetches the keys that its queries attend to, and
makes one ordinary call of the kernel. Any number of heads and ranks; documents, windows and stems decide what is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from axattn.documents.sequence_shard import SequenceShard
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.masks.shard_mask import LayoutMask, PlacedMask
from axattn.parallel.fetch_plan import Rule, fetched, layout_of
from axattn.parallel.redistribution import Redistribution, redistribution
from axattn.parallel.ulysses import reasons_against_call


class FetchPlan(NamedTuple):
    """One rank's part in fetching keys.

    Attributes:
        mask: of its queries over its own keys and the fetched ones after them.
        fetch: what it sends, and what it gets.
    """

    mask: LayoutMask
    fetch: Redistribution


def plan_of(shard: SequenceShard, rule: Rule, device: torch.device) -> FetchPlan:
    """The plan of a forward for one rule, made once for all layers."""
    placement, rank, key = shard.placement, shard.fetch_rank, (rule, device)
    if placement is None:
        raise AssertionError("only placed tokens fetch keys")
    if key not in shard.memo:
        wanted = fetched(placement, rule)
        mask = LayoutMask(layout_of(placement, rank, rule, wanted[rank]), device)
        way = redistribution(wanted, placement.owner, placement.slot, rank, shard.fetch_group, device)
        shard.memo[key] = FetchPlan(mask, way)
    found: FetchPlan = shard.memo[key]
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer breaks its graph here
def over_placed(
    attend: Callable[..., Any],
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PlacedMask,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Run `attend` on this rank's queries and all keys that they see.

    Args:
        attend: the attention function (`axattn.attention.interface.attend`).
        name: for `attend`.
        module: the attention module.
        query: this rank's tokens, ``[1, H, slots, D]``.
        key: ``[1, Hkv, slots, D]``.
        value: ``[1, Hkv, slots, Dv]``.
        mask: of the call.
        kwargs: keywords of the call.

    Returns:
        ``[1, slots, H, Dv]`` and None.

    Raises:
        UnsupportedAttentionError: the call has an input that needs whole rows.
    """
    shard = mask.shard
    reasons = reasons_against_call(kwargs)
    if query.shape[0] != 1 or query.shape[2] != shard.length or key.shape[2] != shard.length:
        reasons.append(Reason("cross_lengths", "queries and keys are not this rank's tokens"))
    if reasons:
        ranks = shard.ranks * (1 if shard.placement is None else shard.placement.ranks)
        raise UnsupportedAttentionError(f"{type(module).__name__} can't run over {ranks} ranks", reasons)
    rule = Rule(mask.rule.causal, mask.rule.window, mask.rule.chunk)
    plan = plan_of(shard, rule, query.device)
    if not plan.fetch.idle:
        key, value = _with_fetched(key, value, plan.fetch)
    out, _ = attend(name, module, query, key, value, plan.mask, **kwargs)
    return out, None


def _with_fetched(key: torch.Tensor, value: torch.Tensor, fetch: Redistribution) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of this rank, and after them those that it fetches: ``[1, Hkv, slots + fetched, D]``."""
    heads, D, Dv = key.shape[1], key.shape[3], value.shape[3]
    own = torch.cat([key[0].transpose(0, 1), value[0].transpose(0, 1)], -1).flatten(1)  # [slots, Hkv x (D + Dv)]
    whole = torch.cat([own, fetch.run(own)]).view(-1, heads, D + Dv).transpose(0, 1)[None]
    return whole[..., :D], whole[..., D:]
