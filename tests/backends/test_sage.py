"""sage: whole models on axattn's INT8 kernel (in Triton's interpreter) and on the library (over a strict fake)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import bidirectional_mask_function, sliding_window_causal_mask_function

import axattn
from axattn import backends
from axattn.attention.interface import attend
from axattn.backends import sage
from axattn.errors import BackendUnavailableError, InvalidConfigError, UnsupportedAttentionError
from axattn.machine.environment import Environment
from axattn.masks.mask_interface import lazy_mask
from axattn.planning.planner import require_available
from axattn.planning.routes import ATTRIBUTE, Route
from tests.environments import AMPERE, BLACKWELL, CPU, HOPPER, TURING, machine
from tests.fakes import sageattention
from tests.fakes.machine import hopper
from tests.faults import Patch, fault
from tests.interpreter import INTERPRETED, interpreting
from tests.models import alone, build, positions, tokens
from tests.sampling import part_of

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter is off (no triton from 3.7 on, or a GPU is there)"
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def interpreter() -> Iterator[Environment]:
    with interpreting() as environment:
        yield environment


@pytest.fixture
def library() -> Iterator[None]:
    """A Hopper machine with the sageattention library and no triton."""
    with hopper() as environment, pytest.MonkeyPatch.context() as monkeypatch:  # undone before hopper's own
        here = dataclasses.replace(environment, libraries={**environment.libraries, "sageattention": "1.0.6"})
        without = {key: version for key, version in here.libraries.items() if key != "triton"}
        here = dataclasses.replace(here, libraries=without)
        monkeypatch.setattr(Environment, "current", classmethod(lambda cls: here))
        monkeypatch.setitem(sys.modules, "sageattention", sageattention)
        sage.sage_module.cache_clear()
        sageattention.calls.clear()
        yield
        sage.sage_module.cache_clear()


def softened(family: str = "llama", **options: Any) -> Any:
    """A model whose attention spreads over several keys: INT8 then costs what it costs a trained model."""
    model = build(family, **options)
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data.div_(4)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if any(part in n for part in PROJECTIONS)}


# ---- axattn's kernel, whole models -----------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize(
    ("backward", "checkpointing"),
    part_of(
        itertools.product(("flash", "exact"), ("none", "reentrant", "not reentrant")),
        kept=[("flash", "none"), ("exact", "reentrant"), ("flash", "not reentrant")],
    ),
)
def test_a_packed_step_has_true_gradients(interpreter: Environment, checkpointing: str, backward: str) -> None:
    ids, lengths = tokens(1, 24), (8, 11, 5)
    reference = softened(head_dim=16).train()
    expected = alone(reference, ids, lengths)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    model = axattn.apply(softened(head_dim=16), "sage", kernel_options={"backward": backward}).train()
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    found = model(ids, position_ids=positions(lengths), use_cache=False).logits
    (found * weight).sum().backward()
    assert relative(found, expected) < 0.015
    for name, wanted in gradients(reference).items():
        got = gradients(model)[name]
        assert got is not None, name
        assert got.norm() > 0, name
        assert relative(got, wanted) < 0.03, name
    assert all(set(layer.served) == {"sage"} for layer in axattn.status(model).layers)


@needs_interpreter
def test_the_interpreter_takes_no_bfloat16(interpreter: Environment) -> None:
    """Triton 3.7's keeps it as integers, and multiplies those; float16 is right."""
    model = axattn.apply(softened(head_dim=16).to(torch.bfloat16), "sage")
    with pytest.raises(UnsupportedAttentionError, match="bfloat16"):
        model(tokens(1, 12))
    model = axattn.apply(softened(head_dim=16).half(), "sage")
    assert relative(model(tokens(1, 12)).logits, softened(head_dim=16)(tokens(1, 12)).logits) < 0.015


@needs_interpreter
@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3"])
def test_families_with_windows_and_norms(interpreter: Environment, family: str) -> None:
    ids, lengths = tokens(1, 30), (13, 17)
    model = axattn.apply(softened(family, head_dim=16), "sage")
    assert (
        relative(model(ids, position_ids=positions(lengths)).logits, alone(softened(family, head_dim=16), ids, lengths))
        < 0.05
    )


@needs_interpreter
@torch.no_grad()
def test_padding_and_generation(interpreter: Environment) -> None:
    reference, model = softened(head_dim=16), axattn.apply(softened(head_dim=16), "sage")
    reference.set_attn_implementation("eager")
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    a, b = (m(ids, attention_mask=mask, position_ids=where).logits[mask.bool()] for m in (model, reference))
    assert relative(a, b) < 0.015
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 18)


@needs_interpreter
@torch.no_grad()
def test_decoding_is_exact_and_leaves_the_cache_as_it_was(interpreter: Environment) -> None:
    model = axattn.apply(softened(head_dim=16, num_hidden_layers=1), "sage")
    exact = copy.deepcopy(model)
    axattn.apply(exact, "varlen")
    ids = tokens(1, 12)
    cache = model(ids, use_cache=True).past_key_values
    keys = cache.layers[0].keys.clone()
    other = copy.deepcopy(cache)
    found = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
    assert torch.equal(cache.layers[0].keys[:, :, :-1], keys)
    assert torch.equal(found, exact(ids[:, :1], past_key_values=other, use_cache=True).logits)


def losses(model: Any, steps: int, period: int, rate: float, rows: int = 8) -> list[float]:
    """Rows that repeat after `period` tokens: the next one stands `period - 1` back, which q and k must learn."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    found = []
    for step in range(steps):
        part = torch.randint(3, 20, (rows, period), generator=torch.Generator().manual_seed(step))
        ids = part.repeat(1, 24 // period)
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@fault("sage: a LoRA run and a full fine-tune no longer follow the exact ones")
def int8_attention_has_no_gradient(patch: Patch) -> None:
    """What the plain library does. The zero keeps the graph of a LoRA run, which has no other way to its adapters."""
    from axattn.backends import int8_operator

    real = int8_operator.attention

    def detached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, logsumexp = real(q.detach(), k.detach(), v.detach(), *rest)
        return out + 0 * q, logsumexp

    patch.setattr(int8_operator, "attention", detached)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.nightly
def test_a_full_fine_tune_follows_the_exact_run_and_without_the_gradient_it_does_not(
    interpreter: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str) -> list[float]:
        return losses(axattn.apply(softened(head_dim=16, num_hidden_layers=1), name), 50, 4, 1e-2)

    exact, quantised = trained("varlen"), trained("sage")
    assert exact[-1] < 0.3 * exact[0]
    assert quantised[-10:] == pytest.approx(exact[-10:], rel=0.02)
    int8_attention_has_no_gradient(monkeypatch)
    assert trained("sage")[-1] > 2 * exact[-1]


@needs_interpreter
def test_lora_follows_the_exact_run_and_without_the_gradient_it_does_not(
    interpreter: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    base = softened(head_dim=16, num_hidden_layers=1)
    losses(base, 40, 4, 1e-2)

    def trained(name: str) -> list[float]:
        torch.manual_seed(0)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(axattn.apply(copy.deepcopy(base), name), LoraConfig(r=8, target_modules=targets))
        return losses(model, 12, 3, 4e-2, rows=2)

    exact, quantised = trained("varlen"), trained("sage")
    assert exact[-1] < 0.3 * exact[0]
    assert sum(quantised) == pytest.approx(sum(exact), rel=0.02)
    int8_attention_has_no_gradient(monkeypatch)
    assert trained("sage")[-1] > 2 * exact[-1]


@needs_interpreter
def test_a_note_says_that_the_interpreter_is_for_tests(interpreter: Environment) -> None:
    assert "for tests, not for speed" in axattn.plan(build("llama"), "sage").notes[0]


@torch.no_grad()
def test_decoding_under_a_softcap_keeps_it() -> None:
    made = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    reference = build("gemma2", **made)
    reference.set_attn_implementation("eager")
    ids = tokens(2, 12)
    with hopper("sage"):
        model = axattn.apply(build("gemma2", **made), "sage")
        steps = []
        for each in (model, reference):
            cache = each(ids, use_cache=True).past_key_values
            steps.append(each(ids[:, :1], past_key_values=cache, use_cache=True).logits)
    assert relative(*steps) < 1e-5


# ---- the library -----------------------------------------------------------------------------------------------------


def run_library(inputs: list[torch.Tensor], mask: Any, options: dict[str, Any] | None = None) -> torch.Tensor:
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.__dict__[ATTRIBUTE] = Route("sage", "layer", ("sage:library",), "sage:library", options=options or {})
    return attend("sage", module, *inputs, mask)[0]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def qkv(length: int, dim: int = 64, rows: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, heads, length, dim, requires_grad=True) for heads in (4, 2, 2)]


@pytest.fixture
def any_device(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's record, for the CPU that the fake runs on."""
    wide = dataclasses.replace(sage.LIBRARY, devices=frozenset({"cpu"}), dtypes=frozenset({"float32"}))
    record, real = dataclasses.replace(sage.BACKENDS[1], capability=wide), backends.get
    monkeypatch.setattr(backends, "get", lambda name: record if name == "sage:library" else real(name))


@pytest.mark.parametrize("length", [2, 63, 64, 65, 100])
def test_the_library_gets_a_copy_of_the_keys_and_a_true_gradient(any_device: None, length: int) -> None:
    inputs = qkv(length)
    keys = inputs[1].detach().clone()
    out = run_library(inputs, lazy_mask(2, length, length))
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True).transpose(
        1, 2
    )
    assert sageattention.calls == ["sageattn"]
    assert torch.equal(inputs[1].detach(), keys)
    assert torch.allclose(out, expected, atol=2e-3)  # the values go through fp16
    weight = torch.randn_like(out)
    for name, a, b in zip(
        "qkv",
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.isfinite(a).all()
        assert a.norm() > 0
        assert relative(a, b) < 1e-5, name


@pytest.mark.parametrize("dim", [64, 128])
def test_the_library_packed(any_device: None, dim: int) -> None:
    from axattn.documents.boundaries import Segments

    inputs = qkv(40, dim, rows=1)
    mask = lazy_mask(1, 40, 40).with_segments(Segments(((0, 13, 40),), torch.device("cpu")))
    out = run_library(inputs, mask)
    assert sageattention.calls == ["sageattn_varlen"]
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, a:b] for x in inputs), is_causal=True, enable_gqa=True
        )
        for a, b in ((0, 13), (13, 40))
    ]
    expected = torch.cat(parts, 2).transpose(1, 2)
    assert torch.allclose(out, expected, atol=2e-3)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_what_the_library_gets_wrong_is_refused(any_device: None) -> None:
    for rule, text in (
        (bidirectional_mask_function, "causal only"),
        (sliding_window_causal_mask_function(9), "no sliding window"),
    ):
        with pytest.raises(UnsupportedAttentionError, match=text):
            run_library(qkv(20), lazy_mask(2, 20, 20, mask_function=rule))
    with pytest.raises(UnsupportedAttentionError, match="serves 64, 128"):
        run_library(qkv(20, 96), lazy_mask(2, 20, 20))


def test_a_short_row_under_a_window_does_not_decide_for_a_long_one(any_device: None) -> None:
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.__dict__[ATTRIBUTE] = Route("sage", "layer", ("sage:library",), "sage:library")

    def run(length: int) -> torch.Tensor:
        mask = lazy_mask(2, length, length, mask_function=sliding_window_causal_mask_function(32))
        return attend("sage", module, *qkv(length), mask)[0]

    assert run(20).isfinite().all()
    with pytest.raises(UnsupportedAttentionError, match="no sliding window"):
        run(64)


def test_decoding_beside_the_library_is_exact(any_device: None) -> None:
    q, k, v = qkv(20)
    out = run_library([q[:, :, -1:], k, v], lazy_mask(2, 1, 20, q_offset=19))
    expected = F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-6)
    assert not sageattention.calls


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("swallows", {"attn_mask": None, "dropout_p": 0.5}),
        ("headdim", {"size": 80}),
        ("as many queries as keys", {"queries": 3}),
        ("padded keys", {"is_causal": False}),
    ],
)
def test_the_fake_refuses_what_the_library_gets_wrong(text: str, change: dict[str, Any]) -> None:
    size, queries = change.pop("size", 64), change.pop("queries", 10)
    q, k, v = (torch.randn(1, 2, n, size) for n in (queries, 10, 10))
    with pytest.raises(Exception, match=text):
        sageattention.sageattn(q, k, v, **{"is_causal": True, **change})


def test_the_fake_writes_into_the_keys_as_the_library_does() -> None:
    q, k, v = (torch.randn(1, 2, 10, 64) for _ in range(3))
    before = k.clone()
    assert sageattention.sageattn(q.requires_grad_(), k, v, is_causal=True).grad_fn is None
    assert not torch.equal(k, before)


# ---- who runs it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "options", "first"),
    [
        (HOPPER, {}, "sage"),
        (AMPERE, {}, "sage"),
        (HOPPER, {"provider": "library"}, "sage:library"),
        (HOPPER, {"provider": "triton"}, "sage"),
        (machine("cuda", 80, triton=None), {}, "sage:library"),
        (machine("cuda", 80, sageattention=None), {}, "sage"),
    ],
)
def test_the_provider(environment: Environment, options: dict[str, Any], first: str) -> None:
    plan = axattn.plan(build("llama", head_dim=64), "sage", environment=environment, kernel_options=options)
    assert {entry.chosen for entry in plan.layers} == {first}


@pytest.mark.parametrize(
    ("environment", "options", "reasons"),
    [
        (CPU, {}, ["sage needs an NVIDIA GPU", "sageattention needs an NVIDIA GPU"]),
        (TURING, {}, ["sm75, sage needs sm80", "sm75, sageattention needs sm80"]),
        (machine("cuda", 80, triton=None, sageattention=None), {}, ["triton is not installed", "sageattention is not"]),
        (machine("cuda", 80, sageattention=None), {"provider": "library"}, ["sageattention is not installed"]),
        (machine("cuda", 80, triton=None), {"provider": "triton"}, ["triton is not installed"]),
    ],
)
def test_every_provider_that_can_not_run_says_why(
    environment: Environment, options: dict[str, Any], reasons: list[str]
) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        require_available("sage", environment, options=options)
    texts = [reason.text for reason in caught.value.reasons]
    assert len(texts) == len(reasons)
    assert all(part in text for part, text in zip(reasons, texts, strict=True))


@needs_interpreter
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"head_dim": 512}, "head_dim=512 .sage serves up to 256"),
        ({"attention_dropout": 0.1}, "no attention dropout"),
    ],
)
def test_models_that_sage_can_not_serve_are_refused_at_load(
    interpreter: Environment, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(UnsupportedAttentionError, match=text):
        axattn.apply(build("llama", **change), "sage")


@needs_interpreter
def test_calls_that_sage_can_not_serve_are_refused(interpreter: Environment) -> None:
    model = axattn.apply(build("llama", head_dim=16), "sage")
    with pytest.raises(UnsupportedAttentionError, match="float64"):
        model.double()(tokens(1, 8))
    model.float()
    with pytest.raises(UnsupportedAttentionError, match="no arbitrary 4-D mask"):
        model(tokens(1, 8), attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool).tril())
    with pytest.raises(InvalidConfigError, match="provider='hub'"):
        axattn.apply(model, "sage", kernel_options={"provider": "hub"})
    assert model(tokens(1, 8)).logits.isfinite().all()


def test_integers_are_refused(any_device: None) -> None:
    with pytest.raises(UnsupportedAttentionError, match="int64"):
        run_library([x.detach().long() for x in qkv(8)], lazy_mask(2, 8, 8))


# ---- the hub kernel --------------------------------------------------------------------------------------------------

HUB = "kernels-community/sage-attention"


@pytest.mark.parametrize("varlen", [True, False])  # the hub's has none: a call for each document
def test_the_hub_kernel_is_run_by_axattn(monkeypatch: pytest.MonkeyPatch, varlen: bool) -> None:
    import types

    seen = []
    module = sageattention if varlen else types.SimpleNamespace(sageattn=sageattention.sageattn)

    def get_kernel(repository: str, *, revision: str, trust_remote_code: bool) -> Any:
        seen.append((repository, revision, trust_remote_code))
        return module

    fake = types.ModuleType("kernels")
    fake.get_kernel = get_kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", fake)
    sage.sage_module.cache_clear()
    with hopper() as environment:
        plan = axattn.plan(build("llama", head_dim=64), f"{HUB}@v1", environment=environment)
        assert plan.running == {"": "sage"}
        assert {entry.chosen for entry in plan.layers} == {f"{HUB}@v1"}
        model = axattn.apply(build("llama", head_dim=64), f"{HUB}@v1")
        record = backends.get(f"{HUB}@v1")
        for layer in model.model.layers:
            route = layer.self_attn.__dict__[ATTRIBUTE]
            wide = dataclasses.replace(record.capability, devices=frozenset({"cpu"}), dtypes=frozenset({"float32"}))
            route.kernels = {record.name: (record, wide)}
        reference = build("llama", head_dim=64)
        found = model(tokens(1, 12), position_ids=positions((5, 7)), use_cache=False).logits
    assert seen == [(HUB, "v1", False)]
    assert relative(found, alone(reference, tokens(1, 12), (5, 7))) < 1e-3
    sage.sage_module.cache_clear()


@pytest.mark.parametrize(
    ("path", "environment", "part"),
    [
        (HUB, HOPPER, "no revision is pinned"),
        (f"{HUB}@v1", machine("cuda", 80, kernels=None), "kernels is not installed"),
        (f"{HUB}@v1", CPU, "needs an NVIDIA GPU"),
        (f"{HUB}@v1:other", HOPPER, "not as 'other'"),
        (f"{HUB}@v1", machine("cuda", 86), "runs on sm80, sm89, sm90, sm120"),
        (f"{HUB}@v1", BLACKWELL, "runs on sm80, sm89, sm90, sm120"),
        ("SageAttention/sage-attention@v1", HOPPER, "not a trusted publisher"),
        ("kernels-community/sage-blackwell@v1", machine("cuda", 120), "has only sageattn3_blackwell"),
    ],
)
def test_what_the_hub_kernel_needs(path: str, environment: Environment, part: str) -> None:
    with pytest.raises(BackendUnavailableError, match=part):
        require_available(path, environment)
