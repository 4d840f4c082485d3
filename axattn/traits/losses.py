"""How a model computes its loss: whether it predicts the next token, and whether it takes shifted targets.

Two sources: the code of its forward, and a run of it on a few tokens (`axattn.hf.probes`).
"""

from __future__ import annotations

import ast
from typing import Any

import torch

from axattn.errors import Reason
from axattn.hf import probes
from axattn.hf.source_inspection import calls_of, code_of, is_named, source_of

IGNORE_INDEX = -100


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """``[B, S]``: the target of each token within its row; the last token of a row has none."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def predicts_next(model: Any) -> bool:
    """Whether a model computes the loss of the next token, from labels aligned with the inputs.

    ``GPT2LMHeadModel`` does so with Transformers' loss function; ``WhisperForCausalLM`` compares each token with the
    label at its index. If neither the source nor a run decides, the class name does.
    """
    by_source = _next_by_source(model)
    if by_source is not None:
        return by_source
    run = probes.loss(model)
    return run.next if run is not None else is_named(model, ("ForCausalLM", "LMHeadModel"))


def takes_keywords(model: Any) -> bool:
    """Whether a model's loss takes keywords of its forward: ``num_items_in_batch``, and ``shift_labels`` if it predicts
    the next token. False if unknown."""
    by_source = _keywords_by_source(model)
    return bool(_keywords_by_run(model) if by_source is None else by_source)


def contradictions(model: Any) -> list[Reason]:
    """Contradictions between the source of a model's loss and a run of it: labels can't be moved to other rows."""
    run = probes.loss(model)
    if run is None:
        return []
    reasons = []
    if _next_by_source(model) not in (None, run.next):
        words = {True: "labels are those of the next token", False: "labels are each token's own"}
        reasons.append(probes.disagreement(model, words[not run.next], words[run.next]))
    if _keywords_by_source(model) not in (None, keywords := _keywords_by_run(model)):
        words = {True: "its loss takes shift_labels and num_items_in_batch", False: "its loss does not take them all"}
        reasons.append(probes.disagreement(model, words[not keywords], words[bool(keywords)]))
    return reasons


def _next_by_source(model: Any) -> bool | None:
    """None without source, or if the source doesn't decide: another forward computes the loss (labels are passed on),
    or something is shifted in a class whose name doesn't imply next-token prediction."""
    forward, named = code_of(model).forward, is_named(model, ("ForCausalLM", "LMHeadModel"))
    if calls_of(forward, "self.loss_function"):
        return named or getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
    source = source_of(forward)
    if any(how in source for how in ("shift_l", "shifted_", ", 1:]")):
        return True if named else None
    return None if not source or _passes_labels_on(forward) else False


def _passes_labels_on(forward: Any) -> bool:
    keywords = [keyword for call in calls_of(forward) for keyword in call.keywords]
    return any(one.arg == "labels" and isinstance(one.value, ast.Name) and one.value.id == "labels" for one in keywords)


def _keywords_by_source(model: Any) -> bool | None:
    """Whether ``**kwargs`` are passed to ``self.loss_function``; None without source, or if labels are passed on."""
    forward = code_of(model).forward
    losses = calls_of(forward, "self.loss_function")
    if losses:
        return all(any(keyword.arg is None for keyword in call.keywords) for call in losses)
    return None if not source_of(forward) or _passes_labels_on(forward) else False


def _keywords_by_run(model: Any) -> bool | None:
    run = probes.loss(model)
    return None if run is None else run.counted and (run.shifted or not run.next)
