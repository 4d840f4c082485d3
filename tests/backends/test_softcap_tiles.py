"""Softcap attention tile by tile, against Gemma 2's eager function and documents alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, eager_attention_forward

import axattn
from axattn.backends import by_document, eager, softcap_tiles
from axattn.backends.call import AttentionCall
from axattn.backends.softcap_tiles import Rule
from axattn.masks.dense_rule import dense_rule
from tests.faults import Inject, Patch, fault
from tests.models import CONFIGS, alone, build, positions, tokens

SCALE, SOFTCAP = 0.7, 2.0
L = 21


@pytest.fixture
def small(monkeypatch: Patch) -> None:
    """Rows of some tokens run on several tiles, of some heads each; the last tile is shorter."""
    few = {"causal": 1, "both ways": 1}
    for name, value in {"SHORTEST": 1, "FEWEST": few, "QUERIES": 8, "WEIGHTS": 700}.items():
        monkeypatch.setattr(softcap_tiles, name, value)
    monkeypatch.setitem(by_document.CALL, "cpu", 0)


@pytest.fixture
def ran(monkeypatch: Patch) -> list[int]:
    """The length of the rows of each forward on tiles."""
    found: list[int] = []
    real = softcap_tiles.forward

    def spy(query: Any, *rest: Any) -> Any:
        found.append(query.shape[2])
        return real(query, *rest)

    monkeypatch.setattr(softcap_tiles, "forward", spy)
    return found


def given(n: int = 3, length: int = L, dims: tuple[int, int] = (8, 5), dtype: Any = torch.float64) -> list[Any]:
    """Query of 4 heads, key and value of 2."""
    torch.manual_seed(0)
    made = [torch.randn(n, heads, length, dim, dtype=torch.float64) for heads, dim in ((4, dims[0]), (2, dims[0]))]
    made.append(torch.randn(n, 2, length, dims[1], dtype=torch.float64))
    return [x.to(dtype).requires_grad_() for x in made]


def module() -> Any:
    return Gemma2Attention(CONFIGS["gemma2"](), 0)


def by_eager(q: Any, k: Any, v: Any, seen: torch.Tensor) -> torch.Tensor:
    """Gemma 2's function, ``[n, L, H, Dv]``."""
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, torch.finfo(q.dtype).min)
    out: torch.Tensor = eager_attention_forward(module(), q, k, v, mask, scaling=SCALE, softcap=SOFTCAP)[0]
    return out


def written_out(q: Any, k: Any, v: Any, seen: torch.Tensor) -> torch.Tensor:
    """The same in float64; Gemma 2's softmax is in float32."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = SOFTCAP * torch.tanh(q @ k.mT * SCALE / SOFTCAP)
    return (logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


LENGTHS = torch.tensor([L, 9, 1])
RULES = {
    "causal": (True, None, False),
    "window": (True, 5, False),
    "window of two": (True, 2, False),
    "both ways": (False, None, False),
    "window both ways": (False, 3, False),
    "both ways, padded": (False, None, True),
    "window both ways, padded": (False, 3, True),
}


def rule_of(kind: str) -> tuple[Rule, torch.Tensor, torch.Tensor]:
    """A rule, the same as a dense mask, and the real tokens ``[n, L]``."""
    causal, window, padded = RULES[kind]
    real = torch.arange(L) < (LENGTHS if padded else torch.full((3,), L))[:, None]
    mask = by_document._mask_of(real, causal, window) if padded else None
    seen = dense_rule(L, L, causal=causal, window=window) if mask is None else mask
    return Rule(SCALE, SOFTCAP, causal, window, mask), seen, real


def with_gradients(out: torch.Tensor, inputs: list[Any], real: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64) * real[:, :, None, None]
    return [(out * real[:, :, None, None]).detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_eager(kind: str, dtype: torch.dtype, small: None) -> None:
    """No further from float64 than eager is; in float32 both are off by its rounding."""
    rule, seen, real = rule_of(kind)
    inputs = given(dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = with_gradients(written_out(*exact, seen), exact, real)
    out = softcap_tiles.attention(*inputs, rule)
    assert out.is_contiguous()
    assert out.dtype == dtype
    found = errors(with_gradients(out, inputs, real), wanted)
    of_eager = errors(with_gradients(by_eager(*inputs, seen), inputs, real), wanted)
    slack = 1e-12 if dtype == torch.float64 else 1e-6 if dtype == torch.float32 else 0.0
    assert all(a <= max(b, slack) for a, b in zip(found, of_eager, strict=True)), (found, of_eager)
    assert max(found) < {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert max(of_eager) < 2e-2


@pytest.mark.parametrize("kind", ["causal", "window", "window both ways, padded"])
def test_first_and_second_derivatives(kind: str, small: None, monkeypatch: Patch) -> None:
    """Numerically; key and value may be computed from the query, or want no gradient."""
    monkeypatch.setattr(softcap_tiles, "QUERIES", 3)
    causal, window, padded = RULES[kind]
    window = None if window is None else 2
    mask = by_document._mask_of(torch.arange(4) < torch.tensor([4, 3])[:, None], causal, window) if padded else None
    real = torch.ones(2, 4, 1, 1, dtype=torch.float64)
    real[1, 3:] = 0 if padded else 1
    rule = Rule(SCALE, SOFTCAP, causal, window, mask)
    q, k, v = (x[:, : x.shape[1] // 2].detach().requires_grad_() for x in given(2, 4, (2, 1)))

    def run(*inputs: Any) -> torch.Tensor:
        return softcap_tiles.attention(*inputs, rule) * real

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(lambda x: run(x, x[:, :1].sin(), x[:, 1:].cos()), (q,))
    assert torch.autograd.gradgradcheck(lambda x: run(x, k.detach(), v.detach()), (q,))


@pytest.mark.parametrize("softcap", [0.5, 50.0, softcap_tiles.MAX_SOFTCAP])
def test_large_logits_neither_vanish_nor_overflow(softcap: float) -> None:
    """Keys that all lie at one end of the softcap, or at both."""
    for ends in ([1.0], [-1.0], [1.0, -1.0]):
        q, k, v = (x.detach().float().requires_grad_() for x in given(1, 512, (8, 5)))
        with torch.no_grad():
            q.fill_(100.0)
            k.copy_((torch.tensor(ends).repeat(512)[:512, None] * 100.0).expand_as(k))
        out = softcap_tiles.attention(q, k, v, Rule(1.0, softcap, True, None))
        exact = [x.detach().double() for x in (q, k, v)]
        weights = softcap * torch.tanh(exact[0] @ exact[1].repeat_interleave(2, 1).mT / softcap)
        weights = weights.masked_fill(~dense_rule(512, 512, causal=True), float("-inf")).softmax(-1)
        wanted = (weights @ exact[2].repeat_interleave(2, 1)).transpose(1, 2)
        assert torch.allclose(out.double(), wanted, atol=1e-4)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_out_as_from_eager(which: int, value: float, small: None) -> None:
    """For every query that sees it, and in the gradients; eager spoils the queries before it too."""
    rule, seen, real = rule_of("causal")
    inputs = given(dtype=torch.float32)
    with torch.no_grad():
        inputs[which][1, 0, 12, 2] = value
    out, *gradients = with_gradients(softcap_tiles.attention(*inputs, rule), inputs, real)
    wanted, *expected = with_gradients(by_eager(*inputs, seen), inputs, real)
    sees = (torch.arange(3) == 1)[:, None] & (torch.arange(L) >= 12)
    assert not wanted[sees].isfinite().all() or (value == float("inf") and which < 2)  # tanh(inf) is 1
    assert torch.allclose(out[sees], wanted[sees], atol=1e-5, equal_nan=True)
    assert torch.allclose(out[[0, 2]], wanted[[0, 2]], atol=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        assert bool(a.isfinite().all()) is bool(b.isfinite().all())


# ---- within eager ----------------------------------------------------------------------------------------------------


def call_of(inputs: list[Any], **options: Any) -> AttentionCall:
    defaults: dict[str, Any] = {"mask": None, "causal": True, "window": None, "scale": SCALE, "dropout": 0.0}
    extras = {"softcap": SOFTCAP}
    rest: dict[str, Any] = {"softcap": SOFTCAP, "sinks": None, "bias": None, "extras": extras}
    return AttentionCall(module(), *inputs, **{**defaults, **rest, **options})


def test_no_weights_are_saved(ran: list[int]) -> None:
    """By the rule as it is. Eager saves several tensors of H x L x L."""
    inputs, sizes = given(1, 600, dtype=torch.float32), []

    def count(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        eager.eager(call_of(inputs))
    assert ran == [600]
    assert max(sizes) <= 4 * 600 * 8
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        eager.eager(call_of(inputs, want_weights=True))
    assert max(sizes) == 4 * 600 * 600


def test_the_largest_tensor_in_a_step_is_a_tile() -> None:
    """Forward and backward of 2,048 tokens: nothing of L x L, not even for one head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor))
            return found

    inputs = given(1, 2048, dtype=torch.float32)
    with Sizes():
        softcap_tiles.attention(*inputs, Rule(SCALE, SOFTCAP, True, None)).sum().backward()
    assert 0 < max(sizes) <= max(softcap_tiles.WEIGHTS, 2 * softcap_tiles.QUERIES * 2048) < 2048**2


OTHERS: dict[str, dict[str, Any]] = {
    "no softcap": {"softcap": None, "extras": {}},
    "a large softcap": {"softcap": 65.0, "extras": {"softcap": 65.0}},
    "dropout": {"dropout": 0.1},
    "weights": {"want_weights": True},
    "a user's mask": {"mask": torch.ones(1, 1, L, L, dtype=torch.bool).tril()},
    "selected keys": {"extras": {"softcap": SOFTCAP, "indices": torch.arange(L).expand(3, L, L)}},
    "a cache": {},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_needs_the_models_function_runs_on_it(what: str, small: None, ran: list[int]) -> None:
    inputs = given(dims=(8, 8), dtype=torch.float32)
    eager.eager(call_of(inputs))
    assert ran == [L]
    call = call_of(inputs, **OTHERS[what])
    if what == "a cache":
        call.query, call.mask = call.query[:, :, -4:], torch.ones(1, 1, 4, L, dtype=torch.bool)
    eager.eager(call)
    assert ran == [L]


def test_other_functions_and_transforms_run_on_the_models(small: None, ran: list[int], monkeypatch: Patch) -> None:
    inputs = given(dims=(8, 8))
    wanted = torch.autograd.grad(eager.eager(call_of(inputs)).sin().sum(), inputs[0])[0]
    assert ran == [L]

    def loss(q: Any) -> torch.Tensor:
        return eager.eager(call_of([q, *inputs[1:]])).sin().sum()

    assert torch.allclose(torch.func.grad(loss)(inputs[0].detach()), wanted, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        direction = torch.randn_like(inputs[0])
        dual = torch.autograd.forward_ad.make_dual(inputs[0].detach(), direction)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    assert torch.allclose(tangent, (wanted * direction).sum(), atol=1e-4)
    assert ran == [L]

    def more(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, temperature: Any = 1, **k: Any) -> Any:
        return eager_attention_forward(module, query, key, value, attention_mask, **k)

    monkeypatch.setattr(eager, "eager_function", lambda module: more)
    eager.eager(call_of(inputs))
    assert ran == [L]


@pytest.mark.parametrize(("n", "length", "causal", "is_tiled"), [
    (2, 256, True, False), (4, 256, True, True), (32, 128, True, False),
    (31, 256, False, False), (32, 256, False, True),
])  # fmt: skip
def test_few_and_short_rows_run_on_the_models_function(
    n: int, length: int, causal: bool, is_tiled: bool, ran: list[int]
) -> None:
    """For 4 heads."""
    with torch.no_grad():
        eager.eager(call_of(given(n, length, dtype=torch.float32), causal=causal))
    assert bool(ran) is is_tiled


# ---- models ----------------------------------------------------------------------------------------------------------

ROWS = ((9, 2, 7, 1, 8, 3), (1, 20, 9), (30,))


def step(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return {"logits": logits.detach(), **found}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-2), name


def packed_step(**config: Any) -> Any:
    """A packed step on `auto`, equal to one of the documents alone."""
    model = build("gemma2", **config)
    ids = tokens(len(ROWS), 30)
    wanted = step(model, torch.cat([alone(model, ids[i : i + 1], lengths) for i, lengths in enumerate(ROWS)]))
    axattn.apply(model, "auto")
    assert_same(step(model, model(input_ids=ids, position_ids=positions(*ROWS), use_cache=False).logits), wanted)
    return model


def test_packed_training_equals_documents_alone(small: None, ran: list[int]) -> None:
    model = packed_step()
    assert set(ran) == {30, 20, 9}  # groups of like length
    assert {tuple(layer.served) for layer in axattn.status(model).layers} == {("eager",)}


def test_long_documents_run_on_tiles_and_short_ones_do_not(ran: list[int]) -> None:
    """By the rule as it is: of documents of 300 and 20 tokens, in windowed and full layers."""
    model, lengths = build("gemma2", max_position_embeddings=1024, sliding_window=100), (20, 300, 300, 300, 20)
    ids = tokens(1, sum(lengths))
    wanted = step(model, alone(model, ids, lengths))
    axattn.apply(model, "auto")
    assert_same(step(model, model(ids, position_ids=positions(lengths), use_cache=False).logits), wanted)
    assert ran == [300, 300]


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_padded_and_whole_rows_equal_rows_alone(side: str, checkpoints: bool, small: None, ran: list[int]) -> None:
    model, ids = build("gemma2"), tokens(3, 24)
    real = torch.ones(3, 24, dtype=torch.long)
    for row, length in enumerate((24, 5, 11)):
        if side != "none":
            real[row, slice(length, 24) if side == "right" else slice(0, 24 - length)] = 0
    expected = [alone(model, ids[row : row + 1, real[row].bool()], (int(real[row].sum()),)) for row in range(3)]
    wanted = step(model, torch.cat([x[0] for x in expected]))
    axattn.apply(model, "auto")
    if checkpoints:
        model.train()
        model.gradient_checkpointing_enable()
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    assert_same(step(model, logits[real.bool()]), wanted)
    assert ran


def test_encoders_run_on_tiles(small: None, ran: list[int]) -> None:
    """Two-sided attention over padded rows, with Gemma 2's function (T5Gemma's encoder has it too)."""
    model, ids = build("gemma2", use_bidirectional_attention=True), tokens(2, 24)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    real = torch.ones(2, 24, dtype=torch.long)
    real[1, 20:] = 0
    model.set_attn_implementation("eager")
    given = {"input_ids": ids, "attention_mask": real, "use_cache": False}
    wanted = step(model, model(**given).logits[real.bool()])
    axattn.apply(model, "auto")
    assert_same(step(model, model(**given).logits[real.bool()]), wanted)
    assert ran


def test_autocast_computes_in_its_dtype(small: None, ran: list[int]) -> None:
    model = axattn.apply(build("gemma2"), "auto").train()
    given = {"input_ids": tokens(1, 30), "position_ids": positions((18, 12)), "use_cache": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**given).logits
        found = step(model, logits.float())  # backward under autocast too
    assert ran
    wanted = step(model, model(**given).logits)
    assert logits.dtype == torch.bfloat16
    assert (found["logits"] - wanted["logits"]).norm() < 0.1 * wanted["logits"].norm()
    for name, value in wanted.items():
        assert (found[name] - value).norm() < 0.3 * value.norm(), name


def test_a_gradient_penalty_differentiates_twice(small: None, ran: list[int]) -> None:
    model, reference = axattn.apply(build("gemma2"), "auto"), build("gemma2")
    reference.set_attn_implementation("eager")
    found = []
    for each in (model, reference):
        inputs = each.get_input_embeddings()(tokens(2, 20)).detach().requires_grad_()
        logits = each(inputs_embeds=inputs, use_cache=False).logits
        (slope,) = torch.autograd.grad(logits.square().mean(), inputs, create_graph=True)
        found.append(step(each, slope.square()))
    assert ran
    assert_same(found[0], found[1])


def test_traced_calls_keep_their_path(small: None, ran: list[int], monkeypatch: Patch) -> None:
    inputs = given(dims=(8, 8), dtype=torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    eager.eager(call_of(inputs))
    assert not ran


# ---- faults ----------------------------------------------------------------------------------------------------------


@fault("packed training of Gemma 2 on tiles: logits")
def tiles_hide_no_key(patch: Patch) -> None:
    patch.setattr(softcap_tiles, "_hide", lambda *given: None)


@fault("packed training of Gemma 2 on tiles: windowed layers")
def tiles_drop_the_window(patch: Patch) -> None:
    real = softcap_tiles.attention

    def without(q: Any, k: Any, v: Any, rule: Rule) -> torch.Tensor:
        return real(q, k, v, rule._replace(window=None))

    patch.setattr(softcap_tiles, "attention", without)


@fault("packed training of Gemma 2 on tiles: gradients of query and key")
def tiles_differentiate_no_sum_of_weights(patch: Patch) -> None:
    real = softcap_tiles.backward

    def without(grad: Any, q: Any, k: Any, v: Any, out: Any, *rest: Any) -> Any:
        return real(grad, q, k, v, torch.zeros_like(out), *rest)

    patch.setattr(softcap_tiles, "backward", without)


@pytest.mark.parametrize("inject", [tiles_hide_no_key, tiles_drop_the_window, tiles_differentiate_no_sum_of_weights])
def test_faults_turn_a_packed_step_red(inject: Inject, small: None, monkeypatch: Patch) -> None:
    inject(monkeypatch)
    with pytest.raises(AssertionError, match=r"logits|q_proj|k_proj|weight"):
        packed_step()
