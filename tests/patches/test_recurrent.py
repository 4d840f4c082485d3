"""Layers that carry a state along a row: packed rows run document by document through them."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torchs
from transformers.modeling_layers import GradientCheckpointingLayer

import axattn
from axattn.documents.boundaries import Segments
from axattn.documents.document_rows import as_rows
from axattn.errors import UnsupportedAttentionError
from axattn.patches import recurrent as patch
from axattn.patches.forward_wrapper import ForwardWrapper
from axattn.traits.recurrent import recurrent
from axattn.traits.token_mixers import mixers
from tests import distributed, parallel_jobs
from tests.census import examine
from tests.conformance.cases import Batch, packed, padded
from tests.forked import FORKED
from tests.models import HYBRIDS, build, positions, tokens
from tests.sampling import part_of

OLD = Version(transformers.__version__) < Version("5.18")
FAMILIES = (
    "qwen3_next",
    "bamba",
    "falcon_h1",
    "nemotron_h",
    "jamba",
)  # Kimi Linear: tests/census, and test_document_id_masks
FAMILIES += () if OLD else ("lfm2", "zamba")
ROWS = packed((7, 11, 3), (5, 9), (1, 1, 40), pad=2)


def made(family: str) -> Any:
    return build(family) if family in HYBRIDS else examine.build(family, "causal")


def step(model: Any, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of the documents, and every gradient."""
    real = torch.cat(parts)
    (real * torch.randn(real.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    named = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    return {"logits": real.detach(), **{name: grad for name, grad in named.items() if grad is not None}}


def alone(family: str, batch: Batch) -> dict[str, torch.Tensor]:
    model = made(family)
    return step(model, [model(batch.ids[r : r + 1, a:b], use_cache=False).logits[0] for r, a, b in batch.documents])


def together(model: Any, batch: Batch, **inputs: Any) -> dict[str, torch.Tensor]:
    out = model(batch.ids, use_cache=False, **inputs).logits
    return step(model, [out[r, a:b] for r, a, b in batch.documents])


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    floor = 1e-3 * max(x.norm().item() for name, x in expected.items() if name != "logits")
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert ((found[name] - wanted).norm() / (wanted.norm() + floor)).item() < 5e-5, name


@pytest.mark.parametrize("masked", [False, True], ids=["", "2-D mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_documents_alone(family: str, masked: bool) -> None:
    inputs = {"position_ids": ROWS.positions} | ({"attention_mask": ROWS.mask} if masked else {})
    require_equal(together(axattn.apply(made(family), "auto"), ROWS, **inputs), alone(family, ROWS))


@pytest.mark.parametrize("kind", ["reentrant", "Transformers'", "torch's wrapper"])
@pytest.mark.parametrize("family", ["qwen3_next", "bamba", "jamba"])
def test_a_layer_that_runs_again_in_backward_knows_its_documents(family: str, kind: str) -> None:
    model = axattn.apply(made(family), "auto").train()
    if kind == "torch's wrapper":
        torchs.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, GradientCheckpointingLayer))
    else:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    require_equal(together(model, ROWS, position_ids=ROWS.positions), alone(family, ROWS))


@FORKED
@pytest.mark.parametrize(("family", "how"), [("qwen3_next", "FSDP2"), ("bamba", "DDP")])
def test_layers_that_are_sharded_or_copied_over_processes(family: str, how: str) -> None:
    for error in distributed.run(2, parallel_jobs.hybrid_in_packed_rows, family, how):
        assert error < 1e-4


def test_a_checkpoint_that_keeps_nothing_is_refused() -> None:
    """Zamba's layers are given nothing by keyword that lasts."""
    model = axattn.apply(made("zamba"), "auto").train()
    torchs.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, GradientCheckpointingLayer))
    with pytest.raises(UnsupportedAttentionError, match="its documents are unknown"):
        together(model, ROWS, position_ids=ROWS.positions)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "nemotron_h"])
def test_unpadded_rows_equal_documents_alone(family: str, side: str) -> None:
    batch = padded(12, 7, 30, 5, side=side)
    model = axattn.apply(made(family), "auto", unpad=True)
    require_equal(together(model, batch, attention_mask=batch.mask), alone(family, batch))


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "varlen", "sdpa", "eager"])
def test_every_name_takes_packed_rows(name: str) -> None:
    model, batch = axattn.apply(made("bamba"), name), packed((7, 11, 3))
    found = model(batch.ids, position_ids=batch.positions, use_cache=False).logits[0]
    assert torch.allclose(found, alone_logits("bamba", batch), atol=1e-5)


def alone_logits(family: str, batch: Batch) -> torch.Tensor:
    model = made(family)
    return torch.cat([model(batch.ids[r : r + 1, a:b], use_cache=False).logits[0] for r, a, b in batch.documents])


@torch.no_grad()
def test_the_cache_of_packed_rows_is_not_continued() -> None:
    model, batch = axattn.apply(made("qwen3_next"), "auto"), packed((7, 11, 3))
    out = model(batch.ids, position_ids=batch.positions, use_cache=True)
    assert torch.allclose(out.logits[0], alone_logits("qwen3_next", batch), atol=1e-5)
    with pytest.raises(axattn.AxattnError, match="several documents"):
        model(batch.ids[:, :1], past_key_values=out.past_key_values)


@torch.no_grad()
@pytest.mark.parametrize("part", part_of(["model", "layers", "mixers"], kept=[]))
def test_compiled_rows_are_right_or_refused(part: str) -> None:
    torch._dynamo.reset()
    model, batch = axattn.apply(made("bamba"), "auto"), packed((7, 11, 3))
    dense = made("bamba")(batch.ids, use_cache=False).logits
    run = torch.compile(model, backend="eager") if part == "model" else model
    inner = {"model": [], "layers": model.model.layers, "mixers": [one.module for one in recurrent(model)]}
    for module in inner[part]:
        module.compile(backend="eager")
    assert torch.allclose(run(batch.ids, use_cache=False).logits, dense, atol=1e-5)
    given = {"position_ids": batch.positions, "use_cache": False}
    if part == "mixers":
        assert torch.allclose(run(batch.ids, **given).logits[0], alone_logits("bamba", batch), atol=1e-5)
    else:
        with pytest.raises((UnsupportedAttentionError, RuntimeError), match="document by document"):
            run(batch.ids, **given)
    assert torch.allclose(run(batch.ids, use_cache=False).logits, dense, atol=1e-5)


@torch.no_grad()
def test_documents_that_do_not_reach_a_layer_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch._DocumentMaskHook, "_documents", lambda *given: [])
    model = axattn.apply(made("qwen3_next"), "auto")
    with pytest.raises(UnsupportedAttentionError, match="did not reach it"):
        model(tokens(1, 10), position_ids=positions((4, 6)), use_cache=False)


def test_restore_copy_and_pickle() -> None:
    model = axattn.apply(made("qwen3_next"), "auto")
    layers = list(recurrent(model))
    assert layers
    assert all(isinstance(layer.module.forward, ForwardWrapper) for layer in layers)
    batch = packed((7, 11, 3))
    model(batch.ids, position_ids=batch.positions, use_cache=False)
    copies = [copy.deepcopy(model)]
    if not OLD:  # 5.17 puts functions of `kernels` into models, which can't be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        found = other(batch.ids, position_ids=batch.positions, use_cache=False).logits[0]
        assert torch.allclose(found, alone_logits("qwen3_next", batch), atol=1e-5)
    axattn.restore(model)
    assert not any("forward" in vars(layer.module) or layer.parent._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("family", ["recurrent_gemma", "minimax"])
def test_layers_of_another_form_are_refused_as_before(family: str) -> None:
    model = axattn.apply(made(family), "auto")
    assert not list(recurrent(model))
    assert mixers(model, by_document=True)
    with pytest.raises(UnsupportedAttentionError, match="mix tokens outside of attention"):
        model(tokens(1, 10), position_ids=positions((4, 6)), use_cache=False)


# ---- documents as rows ---------------------------------------------------------------------------------------------

rows_of_documents = st.integers(1, 60).flatmap(
    lambda length: st.lists(
        st.sets(st.integers(1, max(1, length - 1)), max_size=12).map(
            lambda cuts: (0, *sorted(cut for cut in cuts if cut < length), length)
        ),
        min_size=1,
        max_size=4,
    )
)


@settings(deadline=None, max_examples=60)
@given(rows_of_documents)
def test_every_token_is_in_one_place_of_one_group_and_finds_its_way_back(rows: list[tuple[int, ...]]) -> None:
    segments = Segments(tuple(rows), torch.device("cpu"))
    documents = as_rows(segments, torch.device("cpu"))
    assert as_rows(segments, torch.device("cpu")) is documents
    flat = torch.arange(segments.rows * segments.length)
    parts = []
    for group in documents.groups:
        taken = flat[group.tokens]
        for document, real in zip(taken, group.real, strict=True):
            inside = document[real].tolist()
            row, start = divmod(inside[0], segments.length)
            edges = segments.boundaries[row]
            assert (start, start + len(inside)) in pairwise(edges)
            assert inside == list(range(inside[0], inside[0] + len(inside)))
        parts.append(taken.flatten()[group.places])
        lengths = group.real.sum(-1)
        assert group.real.numel() <= max(2 * int(lengths.sum()), 1.5 * flat.numel())  # what is computed for nothing
    assert torch.equal(torch.cat(parts)[documents.back], flat)


def test_a_part_of_a_layer_that_carries_a_state_itself_is_not_taken_for_the_layer() -> None:
    """Its convolution alone by document would let the state around it run on."""
    model = made("qwen3_next")
    (layer,) = recurrent(model)
    model.model.layers[0].linear_attn = torch.nn.Sequential(layer.module)
    assert not list(recurrent(model))
    assert mixers(model, by_document=True)
