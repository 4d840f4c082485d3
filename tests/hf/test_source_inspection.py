"""What a model's source says holds for what a user, FSDP2 or checkpoint code derives from it."""

from __future__ import annotations

import ast
import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.hf.source_inspection import code_of, is_named, origin, signature_of
from axattn.parallel.checks import reasons_against
from tests.census import examine
from tests.models import build, positions, tokens
from tests.unpadding.test_unpadded_forward import batch


class Plain(tf.LlamaForCausalLM):
    """Changes nothing."""


class Wrapped(tf.LlamaForCausalLM):
    """Passes everything on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Rewritten(tf.LlamaForCausalLM):
    """Computes something of its own."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.model(input_ids, **kwargs)


def as_class(model: Any, cls: type) -> Any:
    """The model as an instance of another class with the same weights."""
    other = copy.deepcopy(model)
    other.__class__ = cls
    return other


def sharded(model: Any) -> Any:
    """As FSDP2 leaves a model: of a class made on the fly, in a file of torch."""
    cls = type(model)
    return as_class(model, type(f"FSDP{cls.__name__}", (cls,), {"__module__": "torch.distributed.fsdp"}))


def test_the_code_of_a_subclass_is_what_it_adds_to() -> None:
    assert origin(Plain) is origin(Wrapped) is tf.LlamaForCausalLM
    assert origin(Rewritten) is Rewritten
    assert origin(torch.nn.Linear) is torch.nn.Linear
    assert code_of(sharded(build("opt"))) is tf.OPTForCausalLM
    assert is_named(as_class(build("llama"), Plain), ("ForCausalLM",))
    assert "position_ids" in signature_of(as_class(build("llama"), Wrapped)).parameters
    assert list(signature_of(as_class(build("llama"), Rewritten)).parameters) == ["self", "input_ids", "kwargs"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("change", [lambda m: as_class(m, Plain), lambda m: as_class(m, Wrapped), sharded])
def test_labels_of_a_subclass_are_shifted_in_their_own_rows(change: Any, side: str) -> None:
    model = axattn.apply(change(build("llama")), "auto", unpad=True)
    given = batch(side)
    real = given["attention_mask"].bool()
    given["labels"] = given["input_ids"].masked_fill(~real, -100)  # the first token of each row too
    before = torch.nn.functional.pad(real[:, :-1], (1, 0))  # what padding would predict is left out
    wanted = given | {"labels": given["labels"].masked_fill(~before, -100)}
    expected = axattn.apply(build("llama"), "auto")(**wanted, use_cache=False)
    found = model(given["input_ids"], given["attention_mask"], labels=given["labels"])
    assert torch.allclose(found.loss, expected.loss, rtol=1e-5)
    assert torch.allclose(found.logits[real], expected.logits[real], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("unpad", [False, True])
def test_a_sharded_model_counts_its_positions_as_before(unpad: bool) -> None:
    reference = examine.build("opt", "causal")
    given = batch("left", labels=False)
    real = given["attention_mask"].bool()
    model = axattn.apply(sharded(reference), "varlen", unpad=unpad)
    expected = reference(**given, use_cache=False).logits[real]
    assert torch.allclose(model(**given, use_cache=False).logits[real], expected, atol=1e-4)


@torch.no_grad()
def test_a_sharded_classifier_still_reads_the_first_token() -> None:
    for model_type in ("roberta", "bert"):
        reference = examine.build(model_type, "rows")
        model = axattn.apply(sharded(reference), "auto", unpad=True)
        for side in ("left", "right"):
            given = batch(side, labels=False)
            assert torch.allclose(model(**given).logits, reference(**given).logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cls", [Plain, Wrapped])
def test_packed_rows_of_a_subclass_are_the_documents_alone(cls: type) -> None:
    model = axattn.apply(as_class(build("llama"), cls), "varlen")
    ids, lengths = tokens(1, 21), (7, 11, 3)
    alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    mask = torch.ones_like(ids)
    assert torch.allclose(model(ids, mask, positions(lengths)).logits, alone, atol=1e-4)
    assert not reasons_against(model, 2, "ulysses")


def used_class(use: str) -> list[weakref.ref[Any]]:
    """What is left of classes made now, with forwards of their own, once a model of theirs was used."""

    class Attention(type(build("llama").model.layers[0].self_attn)):  # type: ignore[misc]  # a class found at run time
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Mine(tf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = as_class(build("llama"), Mine)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention
    if use == "set_attn_implementation":
        model.set_attn_implementation("varlen")
    else:
        axattn.apply(model, "auto", unpad=use == "unpad")
    if use == "packed":
        model(tokens(1, 8), position_ids=positions((5, 3)))
    else:
        model(**batch("left", labels=False))
    axattn.plan(model, "auto")
    axattn.restore(model)
    return [weakref.ref(one) for one in (Attention, Mine, Attention.forward, Mine.forward)]


@pytest.mark.parametrize("use", ["packed", "unpad", "set_attn_implementation"])
def test_classes_made_at_run_time_are_not_kept(use: str) -> None:
    made = used_class(use)
    gc.collect()
    assert not [one() for one in made if one() is not None]


VALUES = {"str", "int", "bool", "int | None", "torch.dtype", "torch.device", "frozenset[str]", "tuple[int, int]"}


def test_caches_that_live_as_long_as_the_process_hold_values_only() -> None:
    """``functools.cache`` keeps a class, a function or a module alive: `weak_cache` is for those."""
    held = []
    for file in Path(axattn.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            decorators = " ".join(map(ast.unparse, node.decorator_list)) if isinstance(node, ast.FunctionDef) else ""
            if isinstance(node, ast.FunctionDef) and ("functools.cache" in decorators or "lru_cache" in decorators):
                keys = {ast.unparse(one.annotation) for one in node.args.args if one.annotation is not None}
                held += [f"{file.name}: {node.name}({key})" for key in keys - VALUES]
    assert not held
