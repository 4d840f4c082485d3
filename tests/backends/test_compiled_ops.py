from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import axattn
from axattn.backends.call import AttentionCall
from axattn.backends.compiled_ops.varlen_op import attention_op, over_documents
from axattn.backends.varlen_engine import forward_backward, packed
from axattn.documents import boundaries, traced
from axattn.masks.mask_interface import lazy_mask
from axattn.planning import ranking
from tests.census import examine
from tests.census.expected import Expected
from tests.fakes import flash, int8, torchao
from tests.fakes import xformers as fake_xformers
from tests.fakes.machine import hopper
from tests.models import alone, build, positions, tokens
from tests.operators import documents, inputs, padding
from tests.sampling import part_of

LAUNCHES: dict[str, list[tuple[Any, str]]] = {
    "sage": [(int8, "quantise"), (int8, "forward")],
    "fp8": [(torchao, "fp8_sdpa_quantize"), (flash.FlashAttention3Forward, "flash_attn_varlen_func")],
    "xformers": [(fake_xformers, "memory_efficient_attention")],
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()  # the graphs of other tests count towards torch's limit


def test_the_operator_is_a_well_behaved_one() -> None:
    rest = (None, 0.3, None, "varlen", "{}")
    torch.library.opcheck(attention_op, (*inputs(), documents(), padding(False), True, 4, *rest))
    torch.library.opcheck(attention_op, (*inputs(), None, None, True, None, *rest))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_traced_documents_are_those_read_on_the_host(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    length = data.draw(st.integers(2, 12))
    where = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=rows, max_size=rows))
    )
    real = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=rows, max_size=rows))
    )
    given_mask = data.draw(st.sampled_from([None, real, (real > 0).long(), real > 0]))
    given_where = data.draw(st.sampled_from([None, where, where[:1]]))
    try:
        wanted = boundaries.from_positions(given_where, given_mask, rows, length)
    except axattn.InvalidInputError:
        with pytest.raises(RuntimeError, match="the document ids"):
            traced.from_positions(given_where, given_mask, rows, length)
        return
    found = traced.from_positions(given_where, given_mask, rows, length)
    if wanted is None:
        assert found is None or not found.document_ids.any()
    else:
        assert found is not None
        assert torch.equal(found.document_ids, wanted.document_ids)
        assert torch.equal(found.positions, wanted.positions)


def test_traced_lengths_are_those_read_on_the_host_and_checked_when_the_graph_runs() -> None:
    edges = torch.tensor([0, 3, 6, 10, 12], dtype=torch.int32)
    wanted, found = boundaries.from_cu_seqlens(edges, 2, 6), traced.from_cu_seqlens(edges, 2, 6, "cu_seq_lens_q")
    assert torch.equal(found.document_ids, wanted.document_ids)
    for bad in ([0, 3, 11], [1, 3, 12], [0, 6, 3, 12], [0, 4, 8, 12]):
        with pytest.raises(RuntimeError, match="axattn"):
            traced.from_cu_seqlens(torch.tensor(bad, dtype=torch.int32), 2, 6, "cu_seq_lens_q")


@pytest.mark.nightly
def test_a_compiled_training_step_has_the_gradients_of_the_documents_alone() -> None:
    ids, lengths = tokens(1, 21), (7, 11, 3)
    reference = build("gemma3").train()
    alone(reference, ids, lengths).square().sum().backward()
    model = build("gemma3").train()
    axattn.apply(model, "auto")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, position_ids=positions(lengths)).logits.square().sum().backward()
    for (name, wanted), (_, got) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(got.grad, wanted.grad, atol=1e-4 * wanted.grad.abs().max().item()), name


KERNELS: list[tuple[str, str, dict[str, str]]] = [
    ("sage", "sage", {}),
    ("sage", "sage", {"backward": "exact"}),
    ("fp8", "fp8", {}),
    ("xformers", "xformers", {}),
    ("auto", "flash_attention_2", {}),
    ("auto", "flash_attention_3", {}),
]


@pytest.mark.parametrize(
    ("name", "kernel", "options", "described"),
    part_of(
        [(*kernel, described) for kernel in KERNELS for described in ("positions", "nothing")],
        kept=[
            ("sage", "sage", {}, "positions"),
            ("xformers", "xformers", {}, "nothing"),
        ],
    ),
)
def test_kernels_of_libraries_in_one_graph_with_their_gradients(
    name: str, kernel: str, options: dict[str, str], described: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, lengths = tokens(1, 21), (7, 11, 3) if described == "positions" else (21,)
    reference = build("llama", num_hidden_layers=1).train()
    alone(reference, ids, lengths).square().sum().backward()
    if kernel == "flash_attention_2":  # by itself auto takes varlen first on this machine
        monkeypatch.setattr(ranking, "_HOPPER", tuple(r for r in ranking._HOPPER if r.name != "varlen"))
    with hopper(kernel):
        model = axattn.apply(build("llama", num_hidden_layers=1).train(), name, kernel_options=options)
        inputs = {"position_ids": positions(lengths)} if described == "positions" else {}
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(ids, use_cache=False, **inputs).logits.square().sum().backward()
        assert {layer.compiled for layer in axattn.status(model).layers} == {kernel}
    for (path, wanted), (_, got) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(got.grad, wanted.grad, atol=1e-4 * wanted.grad.abs().max().item()), path


@torch.no_grad()
def test_other_documents_in_the_same_graph() -> None:
    model = axattn.apply(build("llama", num_hidden_layers=1), "varlen")
    graphs = 0

    def counted(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for lengths in ((7, 11, 3), (21,), (1, 19, 1), (4, 4, 4, 4, 5)):
        found = compiled(tokens(1, 21), position_ids=positions(lengths), use_cache=False).logits
        assert torch.allclose(found, alone(build("llama", num_hidden_layers=1), tokens(1, 21), lengths), atol=1e-4)
    assert graphs == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "how"),
    part_of(
        itertools.product(("llama", "mistral"), ("torch.compile", "its own compile")),
        kept=[("mistral", "its own compile")],
    ),
)
def test_a_model_without_a_head_passes_its_documents_to_its_graph(family: str, how: str) -> None:
    """Torch runs the hooks of the outermost module outside of the graph; what they found must reach it."""
    model = axattn.apply(build(family, num_hidden_layers=1).model, "varlen")
    ids, lengths = tokens(2, 12), ((5, 7), (3, 9))
    parts = [
        torch.cat([model(part[None]).last_hidden_state[0] for part in ids[row].split(lengths[row])]) for row in (0, 1)
    ]
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    else:
        model.compile(backend="eager", fullgraph=True)
    given = {"position_ids": positions(*lengths), "attention_mask": torch.ones_like(ids), "use_cache": False}
    assert torch.allclose(compiled(ids, **given).last_hidden_state, torch.stack(parts), atol=1e-4)
    assert {layer.compiled for layer in axattn.status(model).layers} == {"varlen"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "hooks"),
    part_of(
        itertools.product(("llama", "bert"), ("run", "are passed by")),
        kept=[("bert", "are passed by")],
    ),
)
def test_a_compiled_forward_method_takes_packed_rows(model_type: str, hooks: str) -> None:
    """The input hook of the model runs before the graph, or not at all: then the keywords of the call are read."""
    ids = tokens(2, 12)
    reference = build("llama").model if model_type == "llama" else examine.build("bert", "masked").bert
    more = {"use_cache": False} if model_type == "llama" else {}
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    layouts = (((5, 7), (3, 9)), ((2, 10), (4, 4, 4)))
    alone = [
        torch.stack(
            [torch.cat([reference(p[None], **more)[0][0] for p in ids[row].split(rows[row])]) for row in (0, 1)]
        )
        for rows in layouts
    ]
    padded = reference(ids, attention_mask=mask, **more)[0]
    model, graphs = axattn.apply(reference, "auto"), 0

    def counted(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled: Any = torch.compile(model.forward, backend=counted, fullgraph=True)
    if hooks == "run":
        model.forward, compiled = compiled, model
    for rows, expected in zip(layouts, alone, strict=True):
        found = compiled(ids, position_ids=positions(*rows), **more)[0]
        assert torch.allclose(found, expected, atol=1e-4)
    assert graphs == 1
    assert torch.allclose(compiled(ids, attention_mask=mask, **more)[0][mask.bool()], padded[mask.bool()], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "model_type", "head", "side"),
    part_of(
        [
            (name, *model, side)
            for name in ("auto", "eager")
            for model in (("camembert", "masked"), ("opt", "causal"), ("gpt2", "causal"))
            for side in ("left", "right")
        ],
        kept=[
            ("auto", "camembert", "masked", "left"),
        ],
    ),
)
def test_padded_rows_keep_their_own_count_of_positions_in_a_graph(
    model_type: str, head: str, side: str, name: str
) -> None:
    """While a graph is traced nobody knows whether rows are packed; others must get the usual position ids."""
    reference = examine.build(model_type, head)
    batches = Expected(reference, head)
    model = axattn.apply(reference, name)
    model.compile(backend="eager")  # GPT-2's loss logs, which breaks a graph
    assert torch.allclose(batches.on(model, side), batches.rows[side], atol=1e-4)


@pytest.mark.nightly
@torch.no_grad()
def test_documents_with_ids_in_the_mask_start_anew_in_a_graph() -> None:
    model = examine.build("gpt2", "causal")
    ids, lengths = tokens(1, 20), (9, 4, 7)
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    document_ids = torch.cat([torch.full((1, n), i + 1) for i, n in enumerate(lengths)], 1)
    compiled = torch.compile(axattn.apply(model, "auto"), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ids, attention_mask=document_ids, use_cache=False).logits, alone, atol=1e-4)
    whole = compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert torch.allclose(whole, model(ids, use_cache=False).logits, atol=1e-4)


@torch.no_grad()
def test_a_routed_kernel_is_chosen_where_every_number_is_a_symbol() -> None:
    model = axattn.apply(build("gemma2"), "auto")
    expected = model(tokens(1, 9), use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    assert torch.allclose(compiled(tokens(1, 9), use_cache=False).logits, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("native", part_of(["sdpa", "eager"], kept=["sdpa"]))
def test_packed_rows_that_transformers_would_leak_stop_a_compiled_graph_too(native: str) -> None:
    model = axattn.apply(build("llama", num_hidden_layers=1), native)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    one = compiled(tokens(1, 21), position_ids=positions((21,)))
    assert torch.allclose(one.logits, model(tokens(1, 21)).logits, atol=1e-5)
    with pytest.raises(RuntimeError, match="packed rows would leak"):
        compiled(tokens(1, 21), position_ids=positions((7, 14)))


@torch.no_grad()
def test_a_cache_that_a_compiled_packed_row_filled_is_refused() -> None:
    model = axattn.apply(build("llama", num_hidden_layers=1), "varlen")
    compiled = torch.compile(model, backend="eager")
    out = compiled(tokens(1, 21), position_ids=positions((7, 14)), use_cache=True)
    with pytest.raises(axattn.InvalidInputError, match="filled by a row of several"):
        model(tokens(1, 1), past_key_values=out.past_key_values)
    out = compiled(tokens(1, 21), position_ids=positions((21,)), use_cache=True)
    assert torch.isfinite(model(tokens(1, 1), past_key_values=out.past_key_values).logits).all()


@torch.no_grad()
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_has_no_operator_form_keeps_its_softcap(softcap: float | None) -> None:
    """Queries over a cache run outside the operator, where torch's own kernels would drop a softcap."""
    module = build("gemma2").model.layers[0].self_attn
    q, k, v = (torch.randn(2, heads, n, 8) for heads, n in ((4, 3), (2, 9), (2, 9)))
    mask = lazy_mask(2, 3, 9, q_offset=6)
    extras = {} if softcap is None else {"softcap": softcap}
    call = AttentionCall(module, q, k, v, mask, True, None, 1.0, 0.0, softcap, None, None, extras)
    logits = torch.einsum("bhsd,bhtd->bhst", q, k.repeat_interleave(2, 1))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~mask.dense(), float("-inf")).softmax(-1)
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    assert torch.allclose(over_documents(call, "flash_attention_2"), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["sage", "fp8", "xformers"])
def test_kernels_in_operators_launch_on_the_gpu_of_their_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `tests.pretend` can't see: an operator's body is given no pretended tensors."""
    inside, launches = 0, []

    @contextlib.contextmanager
    def guard(x: torch.Tensor) -> Iterator[None]:
        nonlocal inside
        inside += 1
        yield
        inside -= 1

    def launched(kernel: Any) -> Any:
        @functools.wraps(kernel)
        def run(*given: Any, **options: Any) -> Any:
            launches.append(inside)
            return kernel(*given, **options)

        return run

    for holder in (packed, forward_backward):
        monkeypatch.setattr(holder, "on_gpu_of", guard)
    for holder, function in LAUNCHES[name]:
        monkeypatch.setattr(holder, function, launched(getattr(holder, function)))
    with hopper(name):
        q, k, v = (torch.randn(2, heads, 12, 16, requires_grad=True) for heads in (4, 2, 2))
        for ids in (documents(), None):
            out, _ = attention_op(q, k, v, ids, None, True, None, None, 0.25, None, name, "{}")
            out.sum().backward()
    assert len(launches) >= 2
    assert min(launches) == 1
    assert inside == 0
