"""Every decoder, with its head and without, its rows split over the ranks of a process group, against eager's whole."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import axattn
from axattn.errors import AxattnError
from axattn.parallel import average_gradients
from axattn.traits.losses import shifted
from tests.census.examine import Finding, Record, build, every, first_line
from tests.census.expected import LENGTHS, logits_of
from tests.models import positions


def decoders() -> list[tuple[str, str]]:
    """``(head, model_type)`` of every decoder, with its head and without."""
    keys = list(every())
    causal = {model_type for head, model_type in keys if head == "causal"}
    return [(head, model_type) for head, model_type in keys if head in ("causal", "none") and model_type in causal]


STRATEGIES = {"split: auto": "ulysses", "fetch: auto": "fetch"}
"""What is tried, and the strategy of `axattn.sequence_parallel` that it is tried with."""


def examine(keys: list[tuple[str, str]]) -> list[dict[str, Record]]:
    """In every process of a group: each ``(head, model_type)``, dense, packed and padded, by `STRATEGIES`."""
    return [_examine(*key) for key in keys]


def _examine(head: str, model_type: str) -> dict[str, Record]:
    try:
        model = build(model_type, head)
        wanted = {name: _run(model, name) for name in _BATCHES}
    except Exception as failure:  # as in the census of one process
        return {tried: Record(model_type, head, skipped=first_line(failure)) for tried in STRATEGIES}
    records = {}
    for tried, strategy in STRATEGIES.items():
        findings = {name: _find(head, model_type, name, strategy, wanted[name]) for name in _BATCHES}
        records[tried] = Record(model_type, head, type(model).__name__, findings=findings)
    return records


def _batch(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if name == "packed":
        ids = torch.randint(3, 60, (1, sum(LENGTHS)), generator=generator)
        where = positions(LENGTHS)
        return {"input_ids": ids, "position_ids": where, "labels": ids.masked_fill(where == 0, -100)}
    ids = torch.randint(3, 60, (2, 13), generator=generator)
    if name == "dense":
        return {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    if name == "left padding":
        mask = mask.flip(1)
    ids = ids * mask  # pad_token_id 0
    target = mask * torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1)  # what padding predicts is nobody's business
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(target == 0, -100)}


_BATCHES = ("dense", "packed", "right padding", "left padding")


def _run(model: Any, name: str, group: Any = None) -> dict[str, torch.Tensor]:
    """The loss, the real tokens' logits and the gradient of the embeddings; without a group, each document alone."""
    batch = _batch(name)
    table = model.get_input_embeddings().weight
    table.grad = None
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    headless = "labels" not in inspect.signature(type(model).forward).parameters
    if headless:
        del batch["labels"]
    parts = [batch]
    if name == "packed" and group is None:
        cut = {key: x.split(LENGTHS, 1) for key, x in batch.items() if key != "position_ids"}
        parts = [dict(zip(cut, values, strict=True)) for values in zip(*cut.values(), strict=True)]
    done = [model(**part, use_cache=False) for part in parts]
    logits = torch.cat([logits_of(out) for out in done], 1)
    if headless:
        loss = (logits[real] / logits.detach()[real].abs().max()).square().mean()
    else:
        targets = [int((shifted(part["labels"]) != -100).sum()) for part in parts]
        loss = sum(out.loss * count for out, count in zip(done, targets, strict=True)) / sum(targets)
    loss.backward()
    if group is not None:
        average_gradients(model, group)
    return {"loss": loss.detach(), "logits": logits.detach()[real], "gradient": table.grad.clone()}


def _find(head: str, model_type: str, name: str, strategy: Any, wanted: dict[str, torch.Tensor]) -> Finding:
    import torch.distributed as dist

    candidate = build(model_type, head)
    try:
        axattn.apply(candidate, "auto")
        axattn.sequence_parallel(candidate, dist.group.WORLD, strategy=strategy, gather=True)
        found = _run(candidate, name, dist.group.WORLD)
    except AxattnError as refusal:
        return Finding("refused", "; ".join(dict.fromkeys(r.text for r in refusal.reasons)) or str(refusal))
    except Exception as failure:
        return Finding("wrong", first_line(failure))
    for key, value in wanted.items():
        error = (found[key] - value).abs().max().item() / max(1e-3, value.abs().max().item())
        if not error <= (1e-3 if key == "gradient" else 1e-4):  # gradients are sums over ranks, in another order
            return Finding("wrong", f"{key}: relative error {error:.2g}")
    return Finding("ok")


def summaries(records: list[dict[str, Record]]) -> dict[tuple[str, str], dict[str, Finding]]:
    """What each ``(head, model_type)`` gave, by `STRATEGIES`; nothing of those that could not be tried."""
    found: dict[tuple[str, str], dict[str, Finding]] = {}
    for each in records:
        for tried, record in each.items():
            if not record.skipped:
                found.setdefault((record.head, record.model_type), {})[tried] = summary(record)
    return found


def summary(record: Record) -> Finding:
    """One finding for all batches: the worst."""
    for status in ("wrong", "refused"):
        found = [finding for finding in record.findings.values() if finding.status == status]
        if found and (status == "wrong" or len(found) == len(record.findings)):
            return found[0]
    refused = {key: finding.detail for key, finding in record.findings.items() if finding.status == "refused"}
    if refused:
        return Finding("refused", "; ".join(f"{key}: {text}" for key, text in refused.items()))
    return Finding("ok")
