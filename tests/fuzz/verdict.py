"""Runs an example, and says what came: right, refused with a true reason, wrong, or an error of somebody else."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf

import axattn
from axattn.errors import AxattnError
from tests.fuzz import refusals
from tests.fuzz.chat import Chat, Prompt
from tests.fuzz.example import Example
from tests.fuzz.families import ENCODERS, INNER, PLANES, made

__all__ = ["Chat", "Example", "Prompt", "Verdict", "run"]
Result = dict[str, torch.Tensor]
Status = Literal["right", "refused", "no oracle", "wrong", "untrue refusal", "foreign error"]
TOLERANCE = {"float32": 2e-4, "float64": 2e-4, "bfloat16": 0.1, "autocast": 0.1, "autocast over float64": 2e-4}
"""Largest error, relative to the largest value (eager takes its softmax in float32 whatever the weights are)."""


@dataclass(frozen=True)
class Verdict:
    """What came of an example; `detail` is the reason of a refusal, or what was wrong. Without an oracle (stock eager
    itself raises) nothing is known."""

    status: Status
    detail: str = ""
    error: float = 0.0

    @property
    def fine(self) -> bool:
        """Right, or truly refused."""
        return self.status in ("right", "refused", "no oracle")


def run(example: Example | Chat) -> Verdict:
    """Try an example."""
    return _run_chat(example) if isinstance(example, Chat) else _run(example)


def _run(example: Example) -> Verdict:
    try:
        expected = _alone(example)
    except Exception as failure:
        return Verdict("no oracle", f"{type(failure).__name__}: {failure}")
    if any(bool(x.isnan().any()) for x in expected.values()):
        return Verdict("no oracle", "NaN")  # eager's own, in float64 over rows that see nothing
    return _judge(
        example,
        expected,
        lambda: _found(example, _candidate(example)),
        lambda: _found(example, copy.deepcopy(_weights(example))),
        TOLERANCE[example.number],
    )


def _run_chat(chat: Chat) -> Verdict:
    stock = made(chat.family)
    try:
        expected = {} if chat.leaks else chat.play(stock)
    except Exception as failure:
        return Verdict("no oracle", f"{type(failure).__name__}: {failure}")
    verdict = _judge(chat, expected, lambda: chat.play(_candidate(chat)), lambda: expected, TOLERANCE["float32"])
    if chat.leaks and verdict.status not in ("refused", "foreign error"):
        return Verdict("wrong", "a turn went on from a cache that rows of several documents had filled")
    return verdict


def _judge(
    example: Example | Chat,
    expected: Result,
    candidate: Callable[[], Result],
    stock: Callable[[], Result],
    tolerance: float,
) -> Verdict:
    try:
        found = candidate()
    except AxattnError as refusal:
        why = str(refusal)
        if refusals.is_true(example, why):
            return Verdict("refused", why)
        if isinstance(example, Chat) and example.leaks:
            return Verdict("refused", why)
        try:
            value, _ = _error(stock(), expected)
        except Exception:  # stock can't run it either
            return Verdict("refused", why)
        # a refusal that nobody needed: Transformers' own eager attention is right on these very inputs
        known = isinstance(example, Chat) or example.number in ("float32", "float64")  # rounding hides a small leak
        return Verdict("untrue refusal" if known and value <= tolerance else "refused", why)
    except Exception as failure:
        said = f"{type(failure).__name__}: {str(failure)[:300]}"
        try:
            stock()
        except Exception as own:
            if type(own) is type(failure):
                return Verdict("no oracle", f"stock raises too: {said}")
        return Verdict("foreign error", said)
    if isinstance(example, Chat) and example.leaks:
        return Verdict("right")
    value, where = _error(found, expected)
    if value <= tolerance:
        return Verdict("right", error=value)
    return Verdict("wrong", f"{where}: error {value:.2g}", value)


def _error(found: Result, expected: Result) -> tuple[float, str]:
    """The largest error, relative to the largest value, and where."""
    worst, where = 0.0, ""
    gradients = [x.abs().max().item() for name, x in expected.items() if name.startswith("d ")]
    floor = 1e-2 * max(gradients, default=0.0)  # some vanish (that of a bias of keys), and are rounding
    if found.keys() != expected.keys():
        return float("inf"), f"{sorted(found.keys() ^ expected.keys())} on one side only"
    for name, wanted in expected.items():
        got = found[name]
        if got.shape != wanted.shape:
            return float("inf"), f"{name}: shape {list(got.shape)} is not {list(wanted.shape)}"
        if not wanted.numel():
            continue
        largest = max(1e-9, floor if name.startswith("d ") else 0.0, wanted.abs().max().item())
        value = (got.double() - wanted.double()).abs().max().item() / largest
        value = float("inf") if math.isnan(value) else value
        if value > worst:
            worst, where = value, name
    return worst, where


# models


@functools.cache
def _in(family: str, number: str) -> Any:
    """The family's eager model in a dtype. Shared."""
    if number in ("float32", "autocast"):
        return made(family)
    return copy.deepcopy(made(family)).to(torch.bfloat16 if number == "bfloat16" else torch.float64)


def _weights(example: Example) -> Any:
    return _in(example.family, example.number)


def _candidate(example: Example | Chat) -> Any:
    """The model on the name under test, after its steps."""
    number = example.number if isinstance(example, Example) else "float32"
    unpad = example.unpad if isinstance(example, Example) else False
    model = copy.deepcopy(_in(example.family, number))
    axattn.apply(model, example.name, unpad=unpad)
    for step in example.steps if isinstance(example, Example) else ():
        if step == "apply again":
            axattn.apply(model, "varlen" if example.name != "varlen" else "auto")
            axattn.apply(model, example.name, unpad=unpad)
        elif step == "restore and apply":
            axattn.restore(model)
            axattn.apply(model, example.name, unpad=unpad)
        elif step == "using":
            with axattn.using(model, "sdpa"):
                pass
        elif step == "deepcopy":
            model = copy.deepcopy(model)
        else:
            model = pickle.loads(pickle.dumps(model))
    return model


# one forward


def _found(example: Example, model: Any) -> Result:
    """What a model gives for the batch as it is described."""
    given = example.description(PLANES.get(example.family, 0))
    handles: list[Any] = []
    inner = model.get_submodule(INNER[example.family]) if example.family in INNER else model.base_model
    cache = _cache(example, model) if example.family not in ENCODERS else {}
    called = dict(given)
    if example.giver != "caller" and given:
        where = model if example.giver == "hook" else inner
        called = {}
        if example.giver == "inner forward":
            own = inner.forward
            inner.forward = lambda *a, **k: own(*a, **{**k, **given})
            handles.append(_Undo(lambda: _unset(inner, own)))
        else:
            hook = where.register_forward_pre_hook(lambda m, a, k: (a, {**k, **given}), with_kwargs=True)
            handles.append(hook)
    called |= cache
    if example.labels:
        called["labels"] = example.targets
    try:
        return _outputs(example, model, _tokens(example, model, slice(None), slice(None)), called, True)
    finally:
        for handle in handles:
            handle.remove()


class _Undo:
    def __init__(self, undo: Callable[[], None]) -> None:
        self.remove = undo


def _unset(inner: Any, own: Any) -> None:
    del inner.forward
    if inner.forward != own:  # axattn's own stood there
        inner.forward = own


def _cache(example: Example, model: Any) -> dict[str, Any]:
    if example.cache == "default":
        return {}
    if example.cache == "off":
        return {"use_cache": False}
    cache = tf.DynamicCache(config=model.config)
    if example.cache in ("reset", "cropped"):
        plain = tf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(example.ids[:, :3], past_key_values=plain, use_cache=True)
        cache = plain
        if example.cache == "reset" or example.ids.shape[1] < 3:
            cache.reset()
        else:
            cache.crop(-3)
    return {"past_key_values": cache, "use_cache": True}


def _tokens(example: Example, model: Any, rows: slice, columns: slice) -> dict[str, torch.Tensor]:
    ids = example.ids[rows, columns]
    if not example.embeds:
        return {"input_ids": ids}
    embeds = model.get_input_embeddings()(ids).detach()
    return {"inputs_embeds": embeds.requires_grad_(example.training != "no")}


def _outputs(
    example: Example, model: Any, tokens: dict[str, torch.Tensor], inputs: dict[str, Any], checkpoints: bool = False
) -> Result:
    """Output of real tokens, one document after the other ``[tokens, V]``; the loss; gradients."""
    context = torch.autocast("cpu", torch.bfloat16, enabled=example.number.startswith("autocast"))
    trains = example.training != "no"
    checkpoints = "checkpointing" in example.training and checkpoints
    if trains:
        model.train()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": example.training.startswith("reentrant")})
        model.enable_input_require_grads()
    try:
        with torch.set_grad_enabled(trains), context:
            out = model(**tokens, **inputs)
            first = out.logits if hasattr(out, "logits") else out[0]
            real = _real(example, first)
        result: Result = {"output": real.detach().float() if example.number != "float64" else real.detach()}
        if example.labels:
            result["loss"] = out.loss.detach()[None]
        if trains:
            model.zero_grad()
            (real * _weight(example, real)).sum().backward()
            result |= {f"d {n}": p.grad.reshape(1, -1) for n, p in model.named_parameters() if p.grad is not None}
        return result
    finally:
        if checkpoints:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        if trains:
            model.zero_grad()
            model.eval()


def _real(example: Example, out: torch.Tensor) -> torch.Tensor:
    parts = [out[row, a:b][example.real[row, a:b] == 1] for row, a, b in example.documents]
    return torch.cat(parts)


def _alone(example: Example) -> Result:
    """The oracle: stock eager on each document by itself, or, where rows hold one each, on the batch."""
    model = _weights(example)
    if not example.packed and example.described_by not in (
        "lengths",
        "collator",
    ):  # there padding is documents of its own
        called = example.description(PLANES.get(example.family, 0))
        if example.family not in ENCODERS:
            called["use_cache"] = False
        if example.labels:
            called["labels"] = example.targets
        return _outputs(example, model, _tokens(example, model, slice(None), slice(None)), called)
    return _documents_alone(example, model)


def _weight(example: Example, real: torch.Tensor, before: int = 0) -> torch.Tensor:
    """What the output of real tokens ``[tokens, V]``, after `before` others, is multiplied by for its gradient."""
    every = torch.randn(int(example.real.sum()), real.shape[1], generator=torch.Generator().manual_seed(5))
    return every[before : before + real.shape[0]].to(real.dtype)


def _documents_alone(example: Example, model: Any) -> Result:
    planes = PLANES.get(example.family, 0)
    results: list[Result] = []
    sums: dict[str, torch.Tensor] = {}
    losses, targets = [], []
    before = 0
    for row, a, b in example.documents:
        rows, columns = slice(row, row + 1), slice(a, b)
        called: dict[str, Any] = {} if example.family in ENCODERS else {"use_cache": False}
        if "positions" in example.described_by:
            where = example.where[rows, columns]
            called["position_ids"] = where[None].expand(planes, *where.shape) if planes else where
        holes = bool((example.real[rows, columns] == 0).any())
        if holes:
            called["attention_mask"] = example.real[rows, columns]
        if example.labels:
            called["labels"] = example.targets[rows, columns]
        keep = example.real[row, a:b] == 1

        def take(out: torch.Tensor, keep: torch.Tensor = keep) -> torch.Tensor:
            return out[0, keep]

        results.append(_one_alone(example, model, rows, columns, called, take, before))
        before += int(keep.sum())
        if example.labels:
            targets.append(int((example.targets[row, a:b][1:] != -100).sum()))
            losses.append(results[-1].pop("loss") if "loss" in results[-1] else None)
        for name in [n for n in results[-1] if n.startswith("d ")]:
            given = results[-1].pop(name)
            sums[name] = sums[name] + given if name in sums else given
    whole: Result = {"output": torch.cat([result["output"] for result in results]), **sums}
    if example.labels:
        counted = [loss * n for loss, n in zip(losses, targets, strict=True) if n]
        whole["loss"] = sum(counted, torch.zeros(1)) / sum(targets) if sum(targets) else torch.full((1,), float("nan"))
    return whole


def _one_alone(
    example: Example, model: Any, rows: slice, columns: slice, called: dict[str, Any], take: Any, before: int
) -> Result:
    trains = example.training != "no"
    context = torch.autocast("cpu", torch.bfloat16, enabled=example.number.startswith("autocast"))
    model.train(trains)
    try:
        with torch.set_grad_enabled(trains), context:
            out = model(**_tokens(example, model, rows, columns), **called)
            real = take(out.logits if hasattr(out, "logits") else out[0])
        result: Result = {"output": real.detach().float() if example.number != "float64" else real.detach()}
        if example.labels:
            result["loss"] = out.loss.detach()[None]
        if trains:
            model.zero_grad()
            (real * _weight(example, real, before)).sum().backward()
            result |= {f"d {n}": p.grad.reshape(1, -1) for n, p in model.named_parameters() if p.grad is not None}
        return result
    finally:
        model.zero_grad()
        model.eval()
