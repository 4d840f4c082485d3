"""Functions that know dense masks only run document by document: exact, without an S x S mask, and where it pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.t5.modeling_t5 import T5Attention

import axattn
from axattn.backends import by_document, eager, sdpa
from axattn.backends.call import AttentionCall
from axattn.documents.boundaries import Segments
from axattn.hf.mask_functions import Pattern
from axattn.masks.dense_rule import chunk_positions, dense_rule
from axattn.masks.lazy_mask import LazyMask
from tests.models import CONFIGS, alone, build, positions, tokens
from tests.sampling import part_of

Lengths = tuple[tuple[int, ...], ...]
Rows = Callable[..., Any]
CPU = torch.device("cpu")
BY_DEFAULT = by_document.CALL["cpu"]


@pytest.fixture(autouse=True)
def regrouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """However short, documents run as rows. Returns how many groups each mask's rows were put in."""
    found: list[int] = []
    real: Rows = by_document.as_rows

    def spy(members: Any, *rest: Any) -> Any:
        found.append(len(members))
        return real(members, *rest)

    monkeypatch.setattr(by_document, "as_rows", spy)
    monkeypatch.setitem(by_document.CALL, "cpu", 0)
    return found


# ---- models, against documents alone ---------------------------------------------------------------------------------

ROWS: Lengths = ((9, 2, 7, 1, 8, 3), (1, 20, 9), (30,))
FAMILIES = ("gemma2", "gpt_oss", "deepseek_v32", "llama4")


def _model(family: str, **given: Any) -> Any:
    if family == "deepseek_v32":
        from tests.conformance.families import FAMILIES as OF_THE_MATRIX

        return OF_THE_MATRIX[family].make()
    return build(family, **given)


def _step(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return {"logits": logits.detach(), **found}


def _compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-2), name


@pytest.mark.parametrize(
    ("family", "checkpoints"),
    part_of([(family, on) for family in FAMILIES for on in (False, True)], [(f, f == "gemma2") for f in FAMILIES]),
)
def test_packed_rows_equal_documents_alone(family: str, checkpoints: bool, regrouped: list[int]) -> None:
    """Softcap, sinks, selected keys; windows and chunks shorter than a document; grouped heads; short documents."""
    model = _model(family)
    ids = tokens(len(ROWS), 30)
    expected = torch.cat([alone(model, ids[i : i + 1], lengths) for i, lengths in enumerate(ROWS)])
    wanted = _step(model, expected)
    axattn.apply(model, "auto")
    if checkpoints:
        model.train()
        model.gradient_checkpointing_enable()
    given = {"input_ids": ids, "position_ids": positions(*ROWS), "use_cache": False}
    _compare(_step(model, model(**given).logits), wanted)
    if family in ("gemma2", "deepseek_v32"):
        assert regrouped


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(side: str, regrouped: list[int]) -> None:
    model, ids = build("gemma2"), tokens(3, 24)
    real = torch.zeros(3, 24, dtype=torch.long)
    for row, length in enumerate((24, 5, 11)):
        real[row, slice(0, length) if side == "right" else slice(24 - length, 24)] = 1
    expected = [alone(model, ids[row : row + 1, real[row].bool()], (int(real[row].sum()),)) for row in range(3)]
    wanted = _step(model, torch.cat([x[0] for x in expected]))
    axattn.apply(model, "auto")
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    _compare(_step(model, logits[real.bool()]), wanted)
    assert regrouped


def test_a_packed_step_makes_no_dense_mask(regrouped: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule as it is: rows of 1,024 tokens in documents of 128."""
    monkeypatch.setitem(by_document.CALL, "cpu", BY_DEFAULT)
    masks: set[LazyMask] = set()
    real = LazyMask.layout

    def spy(self: LazyMask) -> Any:
        masks.add(self)
        return real(self)

    monkeypatch.setattr(LazyMask, "layout", spy)
    model = axattn.apply(build("gemma2", max_position_embeddings=1024), "auto").train()
    given = {"input_ids": tokens(1, 1024), "position_ids": positions((128,) * 8), "use_cache": False}
    model(**given).logits.sum().backward()
    assert regrouped == [1, 1]  # windowed and full layers
    assert len(masks) == 2
    assert not any(mask.materialised for mask in masks)


@pytest.mark.parametrize("given", [{}, {"attention_mask": torch.ones(2, 16, dtype=torch.long)}], ids=["bare", "ones"])
def test_single_documents_are_not_regrouped(given: dict[str, Any], regrouped: list[int]) -> None:
    model = axattn.apply(build("gemma2"), "auto")
    model(input_ids=tokens(2, 16), use_cache=False, **given)
    assert not regrouped


def test_rows_too_short_to_pay_are_not_regrouped(regrouped: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(by_document.CALL, "cpu", BY_DEFAULT)
    model = axattn.apply(build("gemma2"), "auto")
    model(input_ids=tokens(1, 32), position_ids=positions((8,) * 4), use_cache=False)
    assert not regrouped


def test_a_static_cache_has_keys_after_the_documents(regrouped: list[int]) -> None:
    model, ids = axattn.apply(build("gemma2"), "auto"), tokens(2, 9)
    real = torch.ones(2, 9, dtype=torch.long)
    real[0, :4] = 0
    given = {"input_ids": ids, "attention_mask": real, "max_new_tokens": 4, "do_sample": False}
    found = model.generate(**given, cache_implementation="static", disable_compile=True)
    assert regrouped
    model.set_attn_implementation("eager")
    assert torch.equal(found, model.generate(**given))


# ---- calls, against the dense form -----------------------------------------------------------------------------------


def _mask(
    lengths: Lengths, causal: bool, window: int | None, chunk: int | None, pads: list[tuple[int, int]]
) -> LazyMask:
    """The mask of packed rows; `pads`: padding before and after each row's real tokens, none for `[]`."""
    rows, S = len(lengths), sum(lengths[0])
    edges = tuple((0, *accumulate(row)) for row in lengths)
    segments = Segments(edges, CPU)
    real = None
    if pads:
        at = torch.arange(S)
        real = torch.stack([(at >= before) & (at < S - after) for before, after in pads])
    ids = segments.document_ids
    given = {"causal": causal, "window": window, "chunk": chunk, "documents": ids, "padding": real}
    return LazyMask(
        shape=(rows, 1, S, S),
        pattern=Pattern(causal=causal, window=window, chunk=chunk),
        segments=segments,
        padding=real,
        materialise=lambda: dense_rule(S, S, positions=chunk_positions(S, ids, real, CPU), **given),  # type: ignore[arg-type]  # by name
        device=CPU,
        guarded=True,
    )


MASKS: dict[str, tuple[bool, int | None, int | None, list[tuple[int, int]]]] = {
    "causal": (True, None, None, []),
    "window": (True, 5, None, []),
    "window longer than most documents": (True, 18, None, []),
    "chunk": (True, None, 4, []),
    "both ways": (False, None, None, []),
    "window both ways": (False, 3, None, []),
    "padding on the left": (True, None, None, [(4, 0), (0, 0)]),
    "padding on the right": (True, 6, None, [(0, 3), (0, 31)]),
    "both ways, padding": (False, 3, None, [(2, 3), (0, 5)]),
}
CALL_ROWS: Lengths = ((9, 2, 24, 1, 3), (1, 37, 1))
EXTRAS = ("bias", "bias of the batch", "sinks of tokens", "softcap", "weights", "indices", "block_indices")


def _calls(mask: LazyMask, which: str) -> tuple[AttentionCall, list[torch.Tensor]]:
    """A call with one thing that no varlen kernel serves, and its inputs that have gradients."""
    torch.manual_seed(0)
    (B, _, S, _), heads = mask.shape, 4
    config = CONFIGS["gemma2"](num_attention_heads=heads)
    module: Any = Gemma2Attention(config, 0)
    inputs = [torch.randn(B, n, S, 8, requires_grad=True) for n in (heads, 2, 2)]
    causal = mask.pattern is not None and mask.pattern.causal
    call = AttentionCall(module, *inputs, mask, causal, None, 0.3, 0.0, None, None, None, {})
    if "bias" in which:
        call.bias = torch.randn(B if "batch" in which else 1, heads, S, S, requires_grad=True)
        call.extras = {"position_bias": call.bias}
        inputs.append(call.bias)
    elif which == "sinks of tokens":
        call.sinks = torch.randn(B, heads, S, 1, requires_grad=True)
        call.extras = {"sinks": call.sinks}
        inputs.append(call.sinks)
    elif which == "softcap":
        call.softcap, call.extras = 2.0, {"softcap": 2.0}
    elif which == "weights":
        call.want_weights = True
    elif which == "indices":  # each query's own key is among them, so none attends to nothing
        call.extras = {
            "indices": torch.cat([torch.randint(S, (B, S, 12)), torch.arange(S).expand(B, S)[..., None]], -1)
        }
    elif which == "block_indices":
        config.index_block_size = 4
        own = (torch.arange(S) // 4).expand(B, 2, S)[..., None]
        call.extras = {"block_indices": torch.cat([torch.randint(-1, S // 4 + 1, (B, 2, S, 3)), own], -1)}
    return call, inputs


def _function(which: str) -> Callable[[AttentionCall], torch.Tensor]:
    return sdpa.sdpa if which in ("bias", "indices", "block_indices") else eager.eager


def _eager_with_sinks(module: Any, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any:
    """Inkling 2's, in short: a bias, and a sink for each token."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(2, 3) * given["scaling"]
    if mask is not None:
        logits = logits + mask
    if given.get("position_bias") is not None:
        logits = logits + given["position_bias"]
    if given.get("sinks") is not None:
        logits = torch.cat([logits, given["sinks"]], -1)
    weights = logits.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2), weights


def _run(call: AttentionCall, inputs: list[torch.Tensor], which: str, real: torch.Tensor) -> dict[str, torch.Tensor]:
    out = _function(which)(call)
    weights = torch.zeros(1) if call.weights is None else call.weights * real[:, None, :, None]
    loss = (out * real[:, :, None, None] * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    if call.weights is not None:
        loss = loss + weights.square().sum()
    grads = torch.autograd.grad(loss, inputs)
    return {"out": out.detach() * real[:, :, None, None], "weights": weights.detach(), **dict(enumerate(grads))}  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("which", EXTRAS)
def test_a_call_by_document_equals_the_dense_form(
    which: str, kind: str, regrouped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sinks" in which or which == "bias of the batch":
        monkeypatch.setattr(eager, "eager_function", lambda module: _eager_with_sinks)
    mask = _mask(CALL_ROWS, *MASKS[kind])
    real = torch.ones(2, 39) if mask.padding is None else mask.padding.float()
    call, inputs = _calls(mask, which)
    found = _run(dataclasses.replace(call), inputs, which, real)
    assert len(regrouped) == 1
    assert (regrouped[0] > 1) is (kind != "chunk")  # chunks of 4 are one group
    assert not mask.materialised
    monkeypatch.setitem(by_document.CALL, "cpu", 1 << 60)
    expected = _run(dataclasses.replace(call), inputs, which, real)
    assert len(regrouped) == 1
    _compare(found, expected)


def test_a_tensor_of_the_rows_in_an_eager_function_keeps_them_whole(
    regrouped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that names its keyword may read it; what `**kwargs` swallow has no effect."""

    def reads(module: Any, q: Any, k: Any, v: Any, mask: Any, position_ids: Any = None, **given: Any) -> Any:
        return _eager_with_sinks(module, q, k, v, mask, **given)

    mask = _mask(CALL_ROWS, *MASKS["causal"])
    call, _ = _calls(mask, "plain")
    call.extras = {"position_ids": torch.arange(39)[None]}
    monkeypatch.setattr(eager, "eager_function", lambda module: reads)
    eager.eager(call)
    assert not regrouped
    monkeypatch.setattr(eager, "eager_function", lambda module: _eager_with_sinks)
    eager.eager(call)
    assert regrouped


@pytest.mark.parametrize("function", [sdpa.sdpa, eager.eager], ids=["sdpa", "eager"])
def test_dropout_leaks_nothing_and_keeps_the_scale(function: Any, regrouped: list[int]) -> None:
    """Values are one-hot, so outputs are the probabilities: dropped, or what they are without dropout by 1 - p."""
    mask = _mask(CALL_ROWS, *MASKS["causal"])
    call, _ = _calls(mask, "plain")
    call.value = torch.eye(39).expand(2, 2, 39, 39)
    call.module.train()
    kept = function(dataclasses.replace(call)).detach()
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = torch.stack([function(dataclasses.replace(call, dropout=0.25)) for _ in range(20)])
    assert regrouped
    allowed = mask.dense()[:, 0, :, None]
    assert not dropped.masked_select(~allowed).any()
    ratio = (dropped / kept)[:, allowed.expand_as(kept)]
    is_kept = ratio > 0
    assert torch.allclose(ratio[is_kept], torch.tensor(1 / 0.75), rtol=1e-4)
    assert is_kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert is_kept[0].ne(is_kept[1]).any()  # others each time


def test_groups_hold_like_lengths() -> None:
    mask = _mask(((100, 90, 81, 79, 16, 1, 2, 40),), True, None, None, [])
    layout = mask.layout()
    assert layout is not None
    members = by_document.documents_by_length(layout)
    assert [[document.length for document in each] for each in members] == [[100, 90, 81], [79], [40], [16, 2, 1]]


def test_bias_of_a_t5_encoder_has_its_gradient(regrouped: list[int]) -> None:
    """The bias is the model's, as learned: padded rows of an encoder, relative distances both ways."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0)
    model = tf.T5EncoderModel(config).eval()
    assert any(isinstance(module, T5Attention) for module in model.modules())
    ids, real = tokens(3, 20), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate((20, 3, 8)):
        real[row, :length] = 1
    given = {"input_ids": ids, "attention_mask": real}
    model.set_attn_implementation("eager")
    wanted = _step(model, model(**given).last_hidden_state[real.bool()])
    axattn.apply(model, "auto")
    _compare(_step(model, model(**given).last_hidden_state[real.bool()]), wanted)
    assert regrouped
