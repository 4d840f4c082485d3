"""One architecture, tiny and seeded: is it right on axattn backends, refused with a reason, or wrong?"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import axattn
from axattn.errors import AxattnError
from tests.census.configs import FEWER, HEADS, tiny
from tests.census.expected import Expected
from tests.census.scenarios import FAKED, ON_FEWER, SCENARIOS, Scenario
from tests.census.variants import with_head
from tests.fakes.machine import hopper
from tests.models import amplify

LARGEST = 20_000_000


@dataclass(frozen=True)
class Finding:
    """What one scenario gave on one name.

    Attributes:
        status: ``ok``, ``refused``, ``wrong``, or ``upstream`` where eager alone fails too.
        detail: the reason of a refusal, or what was wrong.
    """

    status: str
    detail: str = ""


@dataclass(frozen=True)
class Record:
    """One architecture.

    Attributes:
        model_type: Transformers' name of it, or that of a variant.
        head: as in `HEADS`.
        model: the class, "" when none could be built.
        skipped: why it could not be tried, "" when it was.
        findings: by ``SCENARIO: NAME``.
    """

    model_type: str
    head: str
    model: str = ""
    skipped: str = ""
    findings: dict[str, Finding] = field(default_factory=dict)


def every() -> Iterator[tuple[str, str]]:
    """Every architecture of the installed Transformers, then its variants: ``(head, model_type)``."""
    from transformers.models.auto import modeling_auto

    types = {head: tuple(getattr(modeling_auto, mapping)) for head, (mapping, _) in HEADS.items()}
    text = {*types["causal"], *types["masked"], *modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}
    types["none"] = tuple(name for name in types["none"] if name in text)
    for head, names in types.items():
        for model_type in (*names, *with_head(names, head)):
            yield head, model_type


def build(model_type: str, head: str) -> Any:
    """A tiny seeded model on eager attention, with weights large enough that attention moves the logits, and none at
    zero: Doge's gates would all be equal.

    Raises:
        ValueError: it would not be tiny.
    """
    import transformers

    auto = getattr(transformers, HEADS[head][1])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(tiny(model_type, head)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters with every known size made small")
    torch.manual_seed(0)
    model = auto.from_config(tiny(model_type, head), attn_implementation="eager")
    amplify(model)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.float().eval()


def examine(model_type: str, head: str) -> Record:
    """Build it and try every scenario."""
    try:
        model = build(model_type, head)
        expected = Expected(model, head)
    except Exception as failure:  # sizes that do not fit, an optional library, inputs beyond text
        return Record(model_type, head, skipped=first_line(failure))
    tried: dict[tuple[str, bool, bool], list[Scenario]] = {}
    for scenario in SCENARIOS:
        if (scenario.heads and head not in scenario.heads) or (scenario.image and expected.image is None):
            continue
        for name in scenario.names:
            if head not in FEWER or name in ON_FEWER:
                tried.setdefault((name, scenario.unpad, scenario.share), []).append(scenario)
    found: dict[str, Finding] = {}
    for (name, unpad, share), scenarios in tried.items():
        found |= _on_one_copy(model, name, {"unpad": unpad, "share_prefixes": share}, scenarios, expected)
    order = (f"{scenario.name}: {name}" for scenario in SCENARIOS for name in scenario.names)
    findings = {key: found[key] for key in order if key in found}
    return Record(model_type, head, type(model).__name__, findings=findings)


def first_line(failure: Exception) -> str:
    """An error as its class and the first line of its text, cut."""
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[0].strip() if lines else ''}"[:160]


UPSTREAM = (
    (("gpt2",), "StopIteration"),  # float32 weights outside autocast: it looks for an nn.Linear, GPT-2 has none
    (("t5gemma2",), "ValueError: Specified `attn_implementation"),  # 5.17 says its classifiers have no sdpa
    (("hrm_text",), "ValueError: `attn_implementation='flash_attention_"),
    (("qwen4_exp", "qwen4_exp_text"), "AttributeError: 'NoneType' object has no attribute 'dtype'"),
    (("qwen4_exp", "qwen4_exp_text"), "IndexError: too many indices for tensor of dimension 2"),
)
"""Errors of Transformers' own: loud, most of its flash path."""


def _fails_on_eager(model: Any, scenario: Scenario, expected: Expected) -> bool:
    """Whether Transformers by itself fails at the same: xLSTM's ``generate``."""
    try:
        with torch.set_grad_enabled(scenario.gradients):
            scenario.run(copy.deepcopy(model), expected)
    except Exception:  # whatever it is, axattn did not raise it
        return True
    return False


def _on_one_copy(
    model: Any, name: str, options: dict[str, Any], scenarios: list[Scenario], expected: Expected
) -> dict[str, Finding]:
    """What scenarios give on one name, one after the other on one copy of the model, which is patched once."""
    findings: dict[str, Finding] = {}
    candidate: Any = None
    remembers = any(getattr(module, "rope_type", "") == "dynamic" for module in model.modules())  # the longest row
    with hopper(name) if name in FAKED else contextlib.nullcontext():
        for scenario in scenarios:
            key = f"{scenario.name}: {name}"
            try:
                if candidate is None or remembers:
                    candidate = axattn.apply(copy.deepcopy(model), name, **options)
                with torch.set_grad_enabled(scenario.gradients):
                    findings[key] = _compared(*scenario.run(candidate, expected), scenario.tolerance, expected)
            except AxattnError as refusal:
                text = "; ".join(dict.fromkeys(r.text for r in refusal.reasons)) or str(refusal)
                findings[key] = Finding("refused", text)
                if candidate is None:  # so will every scenario be
                    return {f"{each.name}: {name}": findings[key] for each in scenarios}
            except Exception as failure:
                shown = first_line(failure)
                known = any(model.config.model_type in types and shown.startswith(text) for types, text in UPSTREAM)
                upstream = known or _fails_on_eager(model, scenario, expected)
                findings[key], candidate = Finding("upstream" if upstream else "wrong", shown), None
        if candidate is not None and findings.get(f"dense: {name}", Finding("")).status == "ok":
            findings[f"dense: {name}"] = _restored(candidate, expected)
    return findings


def _restored(candidate: Any, expected: Expected) -> Finding:
    """Whether a model gives what it gave before it was patched."""
    with torch.no_grad():
        found = _compared(expected.dense(axattn.restore(candidate)), expected.whole, 1e-4, expected)
    return found if found.status == "ok" else Finding(found.status, f"after axattn.restore: {found.detail}")


def _compared(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, expected: Expected) -> Finding:
    finite = wanted.isfinite()  # logits that a model rules out are -inf
    if not torch.equal(found[~finite], wanted[~finite]) or not bool(found[finite].isfinite().all()):
        return Finding("wrong", "other values are infinite, or not a number")
    error = (found - wanted)[finite].abs().max().item()
    scale = max(1.0, wanted[finite].abs().max().item())
    if error <= tolerance * scale:
        return Finding("ok")
    return Finding(
        "wrong", f"off by {error:.2g}, where values reach {scale:.2g} and a leak moves them by {expected.leak:.2g}"
    )
