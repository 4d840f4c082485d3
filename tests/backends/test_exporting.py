"""Graphs for other programs (torch.export, torch.jit.trace, ONNX) and transforms of torch.func."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.func import functional_call, grad, vmap

import axattn
from axattn.errors import AxattnError, UnsupportedAttentionError
from tests.models import build, positions, tokens
from tests.sampling import part_of

WINDOW = 5  # of tests.models
LENGTHS = (WINDOW - 2, WINDOW, 3 * WINDOW)


class Logits(torch.nn.Module):
    """A model as a function of tensors."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.names, tensors, strict=True)), use_cache=False).logits
        return logits


def given(length: int, second: str | None) -> dict[str, torch.Tensor]:
    """Two rows of ids; beside them a mask (of ones, or with padding on either side), or positions."""
    mask = torch.ones(2, length, dtype=torch.long)
    if second == "left":
        mask[0, : length // 3] = 0
    elif second == "right":
        mask[0, -(length // 3) :] = 0
    elif second == "positions":
        return {"input_ids": tokens(2, length), "position_ids": torch.arange(length).expand(2, length)}
    return {"input_ids": tokens(2, length), **({} if second is None else {"attention_mask": mask})}


def recorded(how: str, module: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
    with torch.no_grad():
        if how == "jit":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # stock warns of the same
                return torch.jit.trace(module, example, check_trace=False)
        shapes = (tuple({1: Dim.DYNAMIC} for _ in example),)
        if how == "onnx":
            pytest.importorskip("onnxscript")
            pytest.importorskip("onnxruntime")
            program: Any = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
            return lambda *tensors: program(*tensors)[0]
        graph = torch.export.export(module, example, dynamic_shapes=shapes, strict=how == "strict")
    operators = {str(node.target) for node in graph.graph.nodes}
    assert not [one for one in operators if "axattn" in one or "cummax" in one]  # other programs lack them
    return graph.module()


@torch.no_grad()
@pytest.mark.parametrize(
    ("how", "family", "name", "second"),
    part_of(
        [
            ("export", "mistral", "varlen", None),
            ("export", "mistral", "varlen", "ones"),
            ("export", "mistral", "auto", "positions"),
            ("strict", "mistral", "auto", "ones"),
            ("jit", "mistral", "varlen", "ones"),
            ("jit", "mistral", "auto", "positions"),
            ("jit", "gpt_oss", "auto", "ones"),
            ("jit", "llama4", "auto", "ones"),
            ("onnx", "mistral", "auto", "ones"),
            ("onnx", "mistral", "varlen", "positions"),
        ],
        kept=[
            ("strict", "mistral", "auto", "ones"),
            ("jit", "mistral", "varlen", "ones"),
        ],
    ),
)
def test_one_graph_serves_all_lengths_masks_and_documents(how: str, family: str, name: str, second: str | None) -> None:
    layers = {"num_hidden_layers": 1} if family == "mistral" else {}  # it has a window in each
    reference = build(family, **layers)
    model = axattn.apply(build(family, **layers), name)
    example = given(4 * WINDOW, second)
    names = tuple(example)
    graph = recorded(how, Logits(model, names), tuple(example.values()))
    for length in LENGTHS:
        for kind in ("ones", "left", "right") if second == "ones" else (second,):
            batch = given(length, kind)
            real = batch.get("attention_mask", torch.ones(2, length)).bool()
            expected = Logits(reference, names)(*batch.values())
            assert torch.allclose(graph(*batch.values())[real], expected[real], atol=1e-5), (length, kind)
    if second == "positions":
        ids, documents = tokens(1, 13).expand(2, 13), (8, 5)
        alone = torch.cat([reference(part, use_cache=False).logits for part in ids.split(documents, 1)], 1)
        assert torch.allclose(graph(ids, positions(documents).expand(2, 13)), alone, atol=1e-5)


def differentiated(module: torch.nn.Module, ids: torch.Tensor) -> None:
    grad(lambda given: functional_call(module, given, (ids,)).sum())(dict(module.named_parameters()))


@pytest.mark.parametrize("how", ["export", "jit", "grad"])
def test_a_kernel_that_is_not_exact_is_refused_in_training(how: str) -> None:
    ids = tokens(2, 8)
    module = Logits(axattn.apply(build("llama", num_hidden_layers=1), "s2"), ("input_ids",)).train()
    with pytest.raises(AxattnError, match=r"exact attention would run there.*with axattn\.using\(model, 'auto'\)"):
        differentiated(module, ids) if how == "grad" else recorded(how, module, (ids,))
    expected = build("llama", num_hidden_layers=1)(ids[:, :5]).logits
    assert torch.allclose(recorded("jit", module.eval(), (ids,))(ids[:, :5]), expected, atol=1e-5)


# ---- torch.func ------------------------------------------------------------------------------------------------------


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def loss(model: Any, given: dict[str, torch.Tensor], ids: torch.Tensor, **more: Any) -> torch.Tensor:
    logits = functional_call(model, given, (), {"input_ids": ids, "use_cache": False, **more}).logits
    real = more.get("attention_mask")
    return (logits.square() if real is None else logits.square() * real[..., None]).sum()


def same(found: dict[str, torch.Tensor], *expected: dict[str, torch.Tensor]) -> bool:
    """Whether gradients are the sum of those expected."""
    return all(
        torch.allclose(found[name], torch.stack([one[name] for one in expected]).sum(0), rtol=1e-4, atol=1e-4)
        for name in found
    )


@pytest.mark.parametrize(("family", "name"), [("llama", "auto"), ("mistral", "varlen")])
def test_gradients_by_torch_func_over_packed_rows_are_those_of_the_documents(family: str, name: str) -> None:
    reference, model = build(family), axattn.apply(build(family), name)
    weights, ids, documents = parameters(reference), tokens(1, 13), (8, 5)
    alone = [grad(lambda p, part=part: loss(reference, p, part))(weights) for part in ids.split(documents, 1)]
    packed = {"position_ids": positions(documents)}
    assert same(grad(lambda p: loss(model, p, ids, **packed))(weights), *alone)

    def sample(p: dict[str, torch.Tensor], ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return loss(model, p, ids[None], **{key: x[None] for key, x in more.items()})

    by_sample = vmap(lambda ids, where: grad(lambda p: sample(p, ids, position_ids=where))(weights))
    with pytest.raises(UnsupportedAttentionError, match="Give an attention_mask of ones"):
        by_sample(ids, packed["position_ids"])
    ones = torch.ones(13, dtype=torch.long)
    by_sample = vmap(
        lambda ids, where: grad(lambda p: sample(p, ids, position_ids=where, attention_mask=ones))(weights)
    )
    found = by_sample(ids.expand(2, 13), packed["position_ids"].expand(2, 13))
    assert same({key: x[1] for key, x in found.items()}, *alone)


def test_gradients_by_sample_are_those_of_each_row() -> None:
    reference, model = build("llama"), axattn.apply(build("llama"), "auto")
    weights, ids = parameters(reference), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[1, :2] = 0, 0
    found = vmap(lambda i, m: grad(lambda p: loss(model, p, i[None], attention_mask=m[None]))(weights))(ids, mask)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = grad(lambda p, rows=rows: loss(reference, p, ids[rows], attention_mask=mask[rows]))(weights)
        assert same({key: x[row] for key, x in found.items()}, alone)


def test_an_ensemble_by_vmap_runs_packed_rows() -> None:
    reference, model = build("llama"), axattn.apply(build("llama"), "auto")
    weights, ids, documents = parameters(reference), tokens(1, 13), (8, 5)
    both = {name: torch.stack([value, value * 1.1]) for name, value in weights.items()}

    def run(model: Any, given: dict[str, torch.Tensor], ids: torch.Tensor, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = functional_call(model, given, (ids,), {"use_cache": False, **more}).logits
        return logits

    found = vmap(lambda given: run(model, given, ids, position_ids=positions(documents)))(both)
    for member in range(2):
        own = {name: value[member] for name, value in both.items()}
        alone = torch.cat([run(reference, own, part) for part in ids.split(documents, 1)], 1)
        assert torch.allclose(found[member], alone, atol=1e-5)
