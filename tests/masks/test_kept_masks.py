"""What is kept of masks: by operators of a graph for one forward, of plain rows for many. Never of another batch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import axattn
from axattn.backends.compiled_ops import varlen_op
from axattn.backends.compiled_ops.varlen_op import attention_op
from axattn.hf.tensor_snapshots import memo_of, snapshot
from axattn.masks import mask_interface
from tests.fakes.machine import hopper
from tests.models import alone, build, positions, tokens
from tests.operators import documents, inputs, padding, rule
from tests.sampling import part_of

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with every mask that an operator builds."""
    masks: list[Any] = []
    build_mask = varlen_op._build
    monkeypatch.setattr(varlen_op, "_build", lambda *given: masks.append(given) or build_mask(*given))
    return masks


def attention(ids: Any, real: Any) -> torch.Tensor:
    out: torch.Tensor = attention_op(*inputs(), ids, real, True, None, None, 0.3, None, "varlen", "{}")[0].detach()
    return out


def expected(ids: Any, real: Any) -> torch.Tensor:
    q, k, v = inputs()
    seen = rule(ids, real, True, None, None)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    out = out.transpose(1, 2).detach()
    return out if real is None else out * real[:, :, None, None]


@pytest.mark.parametrize("mode", part_of(MODES, kept=["inference_mode"]))
def test_packed_rows_in_a_graph_are_the_documents_alone(mode: str, built: list[Any]) -> None:
    torch._dynamo.reset()
    model, reference = axattn.apply(build("llama"), "varlen"), build("llama")
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = tokens(1, 21)
    with MODES[mode]():
        where = positions((7, 11, 3))
        for lengths in ((7, 11, 3), (4, 17), (21,)):
            where.copy_(positions(lengths))  # in place: the same tensor says something else
            built.clear()
            found = graph(ids, position_ids=where, use_cache=False).logits
            assert torch.allclose(found, alone(reference, ids, lengths), atol=1e-4)
            assert len(built) == 1  # read once for all layers


@pytest.mark.parametrize("mode", part_of(MODES, kept=[]))
def test_padding_changed_in_place_between_forwards_is_read_anew(mode: str) -> None:
    torch._dynamo.reset()
    model, reference = axattn.apply(build("llama", num_hidden_layers=1), "varlen"), build("llama", num_hidden_layers=1)
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = tokens(1, 21)
    with MODES[mode]():
        real, where = torch.ones_like(ids), torch.zeros_like(ids)
        for padded, lengths in ((3, (8, 10)), (5, (8, 8)), (1, (4, 16))):
            real.fill_(1)[:, :padded] = 0
            where.zero_()[:, padded:] = positions(lengths)
            found = graph(ids, position_ids=where, attention_mask=real, use_cache=False).logits
            assert torch.allclose(found[:, padded:], alone(reference, ids[:, padded:], lengths), atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [True, False])
def test_tensors_that_others_write_to_are_read_at_every_call(mode: str, packed: bool) -> None:
    """Inductor's buffers, and any tensor under inference_mode: no version shows that they changed."""
    with MODES[mode]():
        ids, real = documents() if packed else None, padding(False)
        for left in (0, 1, 2, 3):
            real.numpy()[1, :left] = False
            if ids is not None:
                ids.numpy()[0, : left + 2] = -1
            assert torch.allclose(attention(ids, real), expected(ids, real), atol=1e-5)


def test_a_new_padding_is_not_taken_for_one_that_has_had_its_id() -> None:
    ids, seen = snapshot(documents()), set()
    again = 0
    for left in range(60):
        real = padding(False)
        real[1, : left % 5] = False
        kept = snapshot(real)
        again += id(kept) in seen
        seen.add(id(kept))
        assert torch.allclose(attention(ids, kept), expected(ids, real), atol=1e-5)
        del kept
    assert again  # ids of dead tensors did come back


def test_layers_that_share_snapshots_read_them_once(built: list[Any]) -> None:
    ids, real = snapshot(documents()), snapshot(padding(False))
    for _ in range(3):
        attention(ids, real)
        attention(None, real)
    assert len(built) == 2
    attention(ids, padding(False))
    attention(documents(), real)
    assert len(built) == 4


def test_the_memo_holds_no_batch_alive() -> None:
    ids, real = snapshot(documents()), snapshot(padding(False))
    attention(ids, real)
    attention(None, real)
    gone = [weakref.ref(ids), weakref.ref(real)]
    del ids, real
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_snapshot_is_a_copy_and_a_well_behaved_operator() -> None:
    x = padding(False)[:, 2:]
    copy = snapshot(x)
    assert torch.equal(copy, x)
    assert copy.is_contiguous()
    assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert memo_of(copy) is not None
    assert memo_of(x) is None
    torch.library.opcheck(snapshot, (x,))


@pytest.mark.parametrize("how", part_of(["eager", "compiled layers"], kept=["eager"]))
def test_a_model_trains_after_an_evaluation_in_inference_mode(how: str) -> None:
    """Plain rows keep their mask and its layout: what backward needs of them must not be inference tensors."""
    torch._dynamo.reset()
    mask_interface._causal_masks.clear()
    with hopper("sage"):
        model = axattn.apply(build("llama", num_hidden_layers=1), "sage")
        if how != "eager":
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        with torch.inference_mode():
            model(tokens(2, 12), use_cache=False)
        assert mask_interface._causal_masks
        model.train()(tokens(2, 12), use_cache=False).logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
