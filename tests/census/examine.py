"""One architecture, tiny and seeded: is it right on our names, refused with a reason, or wrong?"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import axattn
from axattn.errors import AxattnError
from tests.census.configs import FEWER, HEADS, tiny
from tests.census.images import TEXT, Image, image_of
from tests.fakes.machine import hopper
from tests.models import amplify, positions

LENGTHS = (7, 9, 4)
LARGEST = 20_000_000
END = 2
"""``eos_token_id`` of the tiny configs."""
FAKED = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers", "sage", "fp8")
"""Kernels that need a GPU: strict fakes stand in."""
NAMES = ("auto", "varlen", *FAKED)
ON_FEWER = ("auto", "varlen", "flash_attention_2", "eager", "sdpa")
"""Of `NAMES` and those of Transformers: what is tried on heads that classify, and on models without a head."""
ON_IMAGES = ("auto", "varlen", "flash_attention_2", "sdpa")
"""What is tried with an image in the text."""


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
        model_type: Transformers' name of it.
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
    """Every architecture of the installed Transformers: ``(head, model_type)``."""
    from transformers.models.auto import modeling_auto

    types = {head: tuple(getattr(modeling_auto, mapping)) for head, (mapping, _) in HEADS.items()}
    text = {*types["causal"], *types["masked"]}
    types["none"] = tuple(name for name in types["none"] if name in text)
    for head, names in types.items():
        for model_type in names:
            yield head, model_type


def build(model_type: str, head: str) -> Any:
    """A tiny seeded model on eager attention, with weights large enough that attention moves the logits.

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
    return model.float().eval()


def examine(model_type: str, head: str) -> Record:
    """Build it and try every scenario."""
    try:
        model = build(model_type, head)
        expected = Expected(model, head)
    except Exception as failure:  # sizes that do not fit, an optional library, inputs beyond text
        return Record(model_type, head, skipped=first_line(failure))
    findings = {}
    for scenario in SCENARIOS:
        if (scenario.heads and head not in scenario.heads) or (scenario.image and expected.image is None):
            continue
        for name in scenario.names:
            if head in FEWER and name not in ON_FEWER:
                continue
            findings[f"{scenario.name}: {name}"] = _find(model, name, scenario, expected)
    return Record(model_type, head, type(model).__name__, findings=findings)


def first_line(failure: Exception) -> str:
    """An error as its class and the first line of its text, cut."""
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[0].strip() if lines else ''}"[:160]


class Expected:
    """Batches, and what eager gives on them: each document alone, whole rows, padded rows.

    Attributes:
        ids: int64 ``[1, 20]``: documents of `LENGTHS`.
        leak: how far the logits of the documents move when they run into each other.
    """

    def __init__(self, model: Any, head: str) -> None:
        generator = torch.Generator().manual_seed(1)
        self.options: dict[str, Any] = {} if head in ("masked", *FEWER) else {"use_cache": False}
        self.head = head
        if head == "seq2seq" and not model.config.is_encoder_decoder:
            raise ValueError("no encoder-decoder")
        self.ids = torch.randint(3, 60, (1, sum(LENGTHS)), generator=generator)
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, 7:] = 0
        two = torch.randint(3, 60, (2, 12), generator=generator)
        self.masks = {"right": mask, "left": mask.flip(1)}
        self.padded = {side: two * m for side, m in self.masks.items()}  # pad_token_id 0
        if head == "rows":  # BART reads the token that ends a row
            self.ids[:, -1] = END
            for side, ids in self.padded.items():
                last = ids.shape[1] - 1 - self.masks[side].flip(1).argmax(-1, keepdim=True)
                ids.scatter_(1, last, END)
        if head == "seq2seq":  # as many targets as source tokens: what a mask of one side must not do to the other
            self.options["decoder_input_ids"] = torch.randint(3, 60, (2, 12), generator=generator)
        with torch.no_grad():
            reference = _on_sdpa(model) if head == "questions" else model
            self.rows = {side: self.on(reference, side) for side in self.masks}
            self.whole = self.dense(model)
            if model.config.model_type == "moshi":
                _require_causal(model, self.ids, self.whole)
            self.alone = self.whole
            self.leak = 0.0
            self.image = image_of(model) if head == "vision" else None
            self.images = {} if self.image is None else self._with_images(model, self.image)
            if head not in ("seq2seq", "rows"):
                parts = [self.logits(model, input_ids=part) for part in self.ids.split(LENGTHS, 1)]
                self.alone = torch.cat(parts, 1)
                self.leak = (self.whole - self.alone).abs().max().item()

    def logits(self, model: Any, **inputs: Any) -> torch.Tensor:
        """Logits ``[B, S, ...]``, of a head with one output a row ``[B, labels]``."""
        return logits_of(model(**inputs, **self.options))

    def _with_images(self, model: Any, image: Image) -> dict[str, torch.Tensor]:
        """Of documents with an image and without: alone, one behind the other in each order, in a padded batch."""
        seen, text = (self.logits(model, **image.row(part)) for part in (image.ids, TEXT))
        batch = image.padded()
        padded = self.logits(model, **batch)[batch["attention_mask"].bool()]
        return {
            "alone": seen,
            "first": torch.cat([seen, text], 1),
            "last": torch.cat([text, seen], 1),
            "padded": padded,
        }

    def dense(self, model: Any) -> torch.Tensor:
        """Logits of whole rows."""
        return self.logits(model, input_ids=self.ids if self.head != "seq2seq" else self.padded["right"].clamp(min=3))

    def on(self, model: Any, side: str) -> torch.Tensor:
        """The loss and the real tokens' logits of a padded batch; of an encoder-decoder, those of every target."""
        mask, ids = self.masks[side], self.padded[side]
        if self.head == "seq2seq":
            return self.logits(model, input_ids=ids, attention_mask=mask)
        made = model(input_ids=ids, attention_mask=mask, **self._labels(ids, mask), **self.options)
        logits = logits_of(made)
        losses = [made.loss.reshape(1)] if "loss" in made else []
        return torch.cat([*losses, (logits if self.head == "rows" else logits[mask.bool()]).flatten()])

    def _labels(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.head == "none":
            return {}
        if self.head == "rows":
            return {"labels": torch.tensor([0, 1])}
        if self.head == "questions":
            first = mask.argmax(-1)
            return {"start_positions": first + 1, "end_positions": first + 3}
        if self.head == "tokens":
            return {"labels": (ids % 2).masked_fill(mask == 0, -100)}
        # what padding predicts is nobody's business
        target = mask * torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1)
        return {"labels": ids.masked_fill(target == 0, -100)}


def _on_sdpa(model: Any) -> Any:
    """A copy on Transformers' default, if it takes that.

    Heads that find answers read padding, and a query that may see nothing is zero there; on eager it is the mean of all
    values.
    """
    copied = copy.deepcopy(model)
    if model._supports_sdpa:
        copied.set_attn_implementation("sdpa")
    return copied


def logits_of(output: Any) -> torch.Tensor:
    """The logits of an output (of where an answer starts and ends as one tensor), without a head the hidden states."""
    if "last_hidden_state" in output:
        hidden: torch.Tensor = output.last_hidden_state
        return hidden
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    found: torch.Tensor = output.logits
    return found


def _require_causal(model: Any, ids: torch.Tensor, whole: torch.Tensor) -> None:
    """Moshi makes no mask where none is given, and eager attention is then not causal (transformers 5.17)."""
    shorter = model(input_ids=ids[:, :-1], use_cache=False).logits
    if not torch.allclose(shorter, whole[:, :-1], atol=1e-4):
        raise ValueError("eager attention sees later tokens here: nothing to compare with")


Run = Callable[[Any, Expected], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Scenario:
    """One thing that is tried.

    Attributes:
        name: as in the tables.
        run: gives what a model gives, and what is right.
        names: the names it is tried on.
        heads: only for these; for all when empty.
        unpad: with ``unpad=True``.
        gradients: run with gradients.
        image: only where an image could be made for the model.
        tolerance: largest error, relative to the largest value.
    """

    name: str
    run: Run
    names: tuple[str, ...] = NAMES
    heads: tuple[str, ...] = ()
    unpad: bool = False
    gradients: bool = False
    image: bool = False
    tolerance: float = 1e-4


def _dense(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    return expected.dense(model), expected.whole


def _right(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    return expected.on(model, "right"), expected.rows["right"]


def _left(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    return expected.on(model, "left"), expected.rows["left"]


def _packed(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    out = expected.logits(model, input_ids=expected.ids, position_ids=positions(LENGTHS))
    if expected.head == "rows":
        return out, torch.full_like(out, torch.inf)  # one output for several documents is wrong, whatever it is
    return out, expected.alone


def _packed_from_1(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions as RoBERTa counts them where padding is token 0; on eager each document alone, with the same ones."""
    where = positions(LENGTHS) + 1
    found = expected.logits(model, input_ids=expected.ids, position_ids=where)
    axattn.restore(model)
    parts = zip(expected.ids.split(LENGTHS, 1), where.split(LENGTHS, 1), strict=True)
    alone = [expected.logits(model, input_ids=ids, position_ids=at) for ids, at in parts]
    return found, torch.cat(alone, 1)


def _packed_by_lengths(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """No positions: the lengths of the documents have to do."""
    edges = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 9, "max_length_k": 9}
    return model(input_ids=expected.ids, **lengths, **expected.options).logits, expected.alone


def _gradients(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the token embeddings, packed, against the sum over documents alone on eager."""
    table = model.get_input_embeddings().weight
    model(input_ids=expected.ids, position_ids=positions(LENGTHS), **expected.options).logits.square().sum().backward()
    found, table.grad = table.grad, None
    axattn.restore(model)
    for part in expected.ids.split(LENGTHS, 1):
        model(input_ids=part, **expected.options).logits.square().sum().backward()
    return found, table.grad


def _generate(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """Six more tokens behind rows padded on the left, from the logits at each step."""

    def run() -> torch.Tensor:
        inputs = {"input_ids": expected.padded["left"], "attention_mask": expected.masks["left"]}
        greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        made = model.generate(**inputs, **greedy, output_logits=True, return_dict_in_generate=True)
        return torch.stack(made.logits)

    found = run()
    axattn.restore(model)
    return found, run()


def _image(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    assert expected.image is not None
    return expected.logits(model, **expected.image.row(expected.image.ids)), expected.images["alone"]


def _image_padded(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    assert expected.image is not None
    batch = expected.image.padded()
    return expected.logits(model, **batch)[batch["attention_mask"].bool()], expected.images["padded"]


def _image_packed(model: Any, expected: Expected) -> tuple[torch.Tensor, torch.Tensor]:
    """Before a document without one, and behind it."""
    image = expected.image
    assert image is not None
    rows = [expected.logits(model, **image.packed(*parts)) for parts in ((image.ids, TEXT), (TEXT, image.ids))]
    return torch.cat(rows, 1), torch.cat([expected.images["first"], expected.images["last"]], 1)


_ONE_SIDED = ("causal", "masked", "vision")
SCENARIOS = (
    Scenario("dense", _dense),
    Scenario("right padding", _right),
    Scenario("left padding", _left),
    Scenario("packed", _packed, (*NAMES, "eager", "sdpa"), (*_ONE_SIDED, *FEWER)),
    Scenario("packed, from position 1", _packed_from_1, ("auto",), ("masked", "tokens", "questions", "none")),
    Scenario("packed, cu_seq_lens alone", _packed_by_lengths, ("auto", "flash_attention_2"), _ONE_SIDED),
    Scenario("packed gradients", _gradients, NAMES, _ONE_SIDED, gradients=True),
    Scenario("right padding, unpad", _right, ("auto",), unpad=True),
    Scenario("left padding, unpad", _left, ("auto",), unpad=True),
    Scenario("generate, left padding", _generate, ("auto",), ("causal", "vision")),
    Scenario("image", _image, ON_IMAGES, ("vision",), image=True),
    Scenario("image, left padding", _image_padded, ON_IMAGES, ("vision",), image=True),
    Scenario("image, packed", _image_packed, ON_IMAGES, ("vision",), image=True),
)


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
    except Exception:  # whatever it is, it is not ours
        return True
    return False


def _find(model: Any, name: str, scenario: Scenario, expected: Expected) -> Finding:
    candidate = copy.deepcopy(model)
    try:
        with hopper(name) if name in FAKED else contextlib.nullcontext():
            axattn.apply(candidate, name, unpad=scenario.unpad)
            with torch.set_grad_enabled(scenario.gradients):
                found, wanted = scenario.run(candidate, expected)
    except AxattnError as refusal:
        return Finding("refused", "; ".join(dict.fromkeys(r.text for r in refusal.reasons)) or str(refusal))
    except Exception as failure:
        shown = first_line(failure)
        known = any(model.config.model_type in types and shown.startswith(text) for types, text in UPSTREAM)
        return Finding("upstream" if known or _fails_on_eager(model, scenario, expected) else "wrong", shown)
    finite = wanted.isfinite()  # logits that a model rules out are -inf
    if not torch.equal(found[~finite], wanted[~finite]) or not bool(found[finite].isfinite().all()):
        return Finding("wrong", "other values are infinite, or not a number")
    error = (found - wanted)[finite].abs().max().item()
    scale = max(1.0, wanted[finite].abs().max().item())
    if error <= scenario.tolerance * scale:
        return Finding("ok")
    return Finding(
        "wrong", f"off by {error:.2g}, where values reach {scale:.2g} and a leak moves them by {expected.leak:.2g}"
    )
