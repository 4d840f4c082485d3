"""What each rank does in the tests of tensor parallelism (``tp_plan="auto"`` of Transformers). No test lives here."""

from __future__ import annotations

from typing import Any

import torch

import axattn
from axattn.errors import AxattnError
from tests.models import build, positions, tokens
from tests.parallel_jobs import compare, gradients

LENGTHS = (7, 9, 4)


def saved(family: str, folder: str) -> Any:
    """A model on eager attention, and a checkpoint of it in `folder` (rank 0 writes)."""
    model = build(family, vocab_size=98)  # Transformers 5.17 splits the head evenly
    model.set_attn_implementation("eager")
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier()
    return model


def packed_and_padded(family: str, folder: str, unpad: bool) -> dict[str, float]:
    """Errors of a model whose weights are split over ranks, against the whole one on eager, documents alone."""
    whole = saved(family, folder)
    model = axattn.from_pretrained(folder, attn_implementation="auto", tp_plan="auto", unpad=unpad)
    found = {"sharded": float(model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0])}
    ids, where = tokens(1, sum(LENGTHS)), positions(LENGTHS)
    alone = torch.cat([whole(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], 1)
    logits = model(ids, position_ids=where, use_cache=False).logits
    found["packed"] = (logits - alone).abs().max().item()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    rows = tokens(2, 12) * mask
    inputs = {"input_ids": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)}
    mine, theirs = (one(**inputs, use_cache=False) for one in (model, whole))
    found["padded"] = ((mine.logits - theirs.logits) * mask[..., None]).abs().max().item()
    (logits.square().mean() + mine.loss).backward()
    (alone.square().mean() + theirs.loss).backward()
    found["gradients"] = compare(gradients(model), gradients(whole))
    return found


def halves_of_heads(folder: str) -> str:
    """What s2 says where a rank holds some heads: which of them shift depends on all."""
    saved("llama", folder)
    model = axattn.from_pretrained(folder, attn_implementation="s2", tp_plan="auto").train()
    try:
        model(tokens(1, 16), use_cache=False)
    except AxattnError as error:
        return str(error)
    return "accepted"
