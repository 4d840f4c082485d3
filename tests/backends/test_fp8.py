"""fp8 over strict fakes of FlashAttention 3 and torchao's quantiser: errors, gradients, documents, options."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import axattn
from axattn.attention.interface import attend
from axattn.backends import fp8
from axattn.backends.varlen_engine.flash_backward import Packed
from axattn.errors import BackendUnavailableError, InvalidConfigError, UnsupportedAttentionError
from axattn.masks.mask_interface import lazy_mask
from axattn.masks.varlen_layout import Layout, Span
from axattn.spec.capability import Need, missing
from tests.conformance.families import FAMILIES
from tests.fakes import flash, fp8_quantiser, torchao
from tests.fakes.machine import hopper
from tests.models import alone, build, positions, tokens

E4M3 = torch.float8_e4m3fn
FORWARD, GRADIENT = 0.06, 0.05
"""The budget: relative error of norms against exact attention, keys far from zero, e4m3 operands and weights."""


@pytest.fixture
def rounding() -> Iterator[None]:
    """A Hopper machine whose fake kernel gets real fp8 numbers."""
    with hopper("fp8"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchao, "STORAGE", E4M3)
        yield


@pytest.fixture
def unrounded() -> Iterator[None]:
    """The same with fp32 in place of fp8: what is left is the adapter's own doing."""
    with hopper("fp8"):
        yield


class Attention(torch.nn.Module):
    is_causal = True


def qkv(length: int = 96, bias: float = 4.0, dtype: torch.dtype = torch.bfloat16, dim: int = 32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(2, heads, length, dim) for heads in (4, 2, 2)]
    made[1] += bias * torch.randn(2, 2, 1, dim)
    return [x.to(dtype).requires_grad_() for x in made]


def exact(inputs: list[torch.Tensor]) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.float() for x in inputs), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def run(inputs: list[torch.Tensor], **options: Any) -> torch.Tensor:
    module = Attention()
    model_route = axattn.planning.routes.Route("fp8", "layer", ("fp8",), "fp8", options=options)
    module.__dict__[axattn.planning.routes.ATTRIBUTE] = model_route
    length = inputs[0].shape[2]
    out, _ = attend("fp8", module, *inputs, lazy_mask(2, length, length))
    return out


# ---- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hadamard", ["none", "v", "qkv"])
def test_the_output_is_within_its_budget(rounding: None, hadamard: str) -> None:
    inputs = qkv()
    assert 1e-3 < relative(run(inputs, hadamard=hadamard), exact(inputs)) < FORWARD


@pytest.mark.parametrize(("backward", "budget"), [("flash", GRADIENT), ("exact", 8e-3)])
def test_gradients_are_within_their_budget(rounding: None, backward: str, budget: float) -> None:
    inputs = qkv()
    weight = torch.randn(2, 96, 4, 32, generator=torch.Generator().manual_seed(7))
    found = torch.autograd.grad((run(inputs, backward=backward) * weight).sum(), inputs)
    wanted = torch.autograd.grad((exact(inputs) * weight).sum(), inputs)
    for name, a, b in zip("qkv", found, wanted, strict=True):
        assert torch.isfinite(a).all()
        assert relative(a, b) < budget, name


@pytest.mark.parametrize("hadamard", ["none", "v", "qkv"])
@pytest.mark.parametrize("backward", ["flash", "exact"])
@pytest.mark.parametrize("dim", [16, 24, 32])
def test_without_rounding_nothing_but_exact_attention_is_left(
    unrounded: None, hadamard: str, backward: str, dim: int
) -> None:
    inputs = qkv(dtype=torch.float32, dim=dim)
    out = run(inputs, hadamard=hadamard, backward=backward)
    assert relative(out, exact(inputs)) < 2e-6
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((exact(inputs) * weight).sum(), inputs)
    assert all(relative(a, b) < 2e-5 for a, b in zip(found, wanted, strict=True))


def test_keys_lose_their_mean_or_the_error_would_be_large(rounding: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = qkv(bias=8.0)
    smooth = relative(run(inputs), exact(inputs))
    monkeypatch.setattr(fp8_quantiser, "smoothed", lambda key, keys: key)
    assert relative(run(inputs), exact(inputs)) > 3 * smooth


def test_a_rotation_spreads_outliers_before_they_are_quantised(rounding: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = fp8.quantised_rows

    def watch(*parts: Any) -> Any:
        seen.append([(x.float().abs().max() / x.float().square().mean().sqrt()).item() for x in parts[:3]])
        return real(*parts)

    monkeypatch.setattr(fp8, "quantised_rows", watch)
    inputs = qkv(bias=0.0)
    with torch.no_grad():
        for x in inputs:
            x[..., 3] *= 100
    for hadamard in ("none", "v", "qkv"):
        run(inputs, hadamard=hadamard)
    none, values, all_three = seen
    assert values[:2] == none[:2]
    assert values[2] < 0.5 * none[2]
    assert all(a < 0.5 * b for a, b in zip(all_three, none, strict=True))


@given(st.sampled_from([16, 24, 32, 48, 64, 80, 96, 128, 256]))
def test_the_rotation_is_its_own_inverse_and_keeps_lengths(dim: int) -> None:
    x = torch.randn(5, 2, dim)
    assert torch.allclose(fp8.rotated(fp8.rotated(x)), x, atol=1e-5)
    assert torch.allclose(fp8.rotated(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("hadamard", ["none", "v", "qkv"])
def test_documents_and_rows_are_quantised_alike(rounding: None, hadamard: str, smooth: bool) -> None:
    q, k, v = (x.detach().transpose(1, 2).flatten(0, 1) for x in qkv())
    rows = Layout((Span(0, 2, 0, 96, 0, 96),), True, None, 2, 96, 96)
    documents = Layout((Span(0, 1, 0, 96, 0, 96), Span(0, 1, 96, 192, 96, 192)), True, None, 1, 192, 192)
    found = [fp8.quantised(q, k, v, layout, hadamard, smooth=smooth) for layout in (rows, documents)]
    for a, b in zip(*((*parts, keys) for parts, keys in found), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float())


def test_rows_with_more_elements_than_torchao_can_count_go_through_axattns_quantiser(
    rounding: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.detach().transpose(1, 2).flatten(0, 1) for x in qkv())
    rows = Layout((Span(0, 2, 0, 96, 0, 96),), True, None, 2, 96, 96)
    torchao.calls.clear()
    for limit in (q.numel(), q.numel() - 1):
        monkeypatch.setattr(fp8, "TORCHAO_LIMIT", limit)
        fp8.quantised(q, k, v, rows, "none", smooth=True)
    assert len(torchao.calls) == 1


# ---- documents ------------------------------------------------------------------------------------------


def test_whole_rows_go_through_torchao_and_documents_do_not(rounding: None) -> None:
    model = axattn.apply(build("llama", head_dim=16).to(torch.bfloat16), "fp8")
    torchao.calls.clear()
    fp8_quantiser.calls.clear()
    model(tokens(2, 12))
    assert torchao.calls == [torch.Size([2, 4, 12, 16])] * 2
    assert fp8_quantiser.calls == ["smoothed"] * 2
    model(tokens(1, 12), position_ids=positions((5, 7)))
    assert len(torchao.calls) == 2
    assert fp8_quantiser.calls[2:] == ["quantise_smoothed", "quantise", "quantise"] * 2


@pytest.mark.parametrize("changed", [0, 6, 11, 17])
def test_a_changed_document_leaves_the_others_bit_for_bit_as_they_were(rounding: None, changed: int) -> None:
    model = axattn.apply(build("llama", head_dim=16).to(torch.bfloat16), "fp8")
    lengths, ids = (5, 6, 7), tokens(1, 18)
    other = ids.clone()
    other[0, changed] = 3 + (other[0, changed] - 2) % 94
    grads = []
    for batch in (ids, other):
        embeds = model.get_input_embeddings()(batch).detach().requires_grad_()
        out = model(inputs_embeds=embeds, position_ids=positions(lengths), use_cache=False).logits[0]
        (grad,) = torch.autograd.grad(out.float().square().sum(), embeds)
        grads.append((out.detach(), grad[0]))
    own = next(number for number, end in enumerate((5, 11, 18)) if changed < end)
    for before, after in zip(*grads, strict=True):
        for number, (a, b) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
            assert torch.equal(a, b) == (number != own)


@torch.no_grad()
def test_a_model_stays_close_to_eager_padded_packed_and_generating(rounding: None) -> None:
    reference = build("llama", head_dim=16)
    model = axattn.apply(build("llama", head_dim=16).to(torch.bfloat16), "fp8")
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    real = mask.bool()
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = [m(ids, attention_mask=mask, position_ids=where).logits[real] for m in (model, reference)]
    assert relative(*padded) < 0.2
    packed = model(ids[:1], position_ids=positions((5, 9))).logits
    assert relative(packed[0], alone(reference, ids[:1], (5, 9))[0]) < 0.2
    flash.calls.clear()
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert set(flash.calls) == {"fp8"}


# ---- what it can't do -----------------------------------------------------------------------------------


def test_a_softcap_is_served_in_inference_and_refused_in_training(unrounded: None) -> None:
    made = {"layer_types": ["full_attention"] * 2, "head_dim": 16, "num_hidden_layers": 2}
    reference = FAMILIES["gemma2"].make(**made)
    reference.set_attn_implementation("eager")
    ids = tokens(1, 12)
    model = axattn.apply(FAMILIES["gemma2"].make(**made), "fp8")
    with torch.no_grad():
        assert relative(model(ids).logits, reference(ids).logits) < 1e-5
    with pytest.raises(UnsupportedAttentionError, match="softcap in training"):
        model.train()(ids)


def test_windows_run_on_flash_attn_3_only(unrounded: None) -> None:
    from tests.environments import machine

    need = Need(head_dim=64, window=128)
    only_forward = machine("cuda", 90, flash_attn_3=None, fa3_fwd="0.0.3")
    texts = [r.text for r in missing(need, fp8.BACKEND.capability_on(only_forward), "fp8")]
    assert texts == ["window=128 (fp8 has no sliding window)"]
    assert missing(need, fp8.BACKEND.capability_on(machine("cuda", 90)), "fp8") == []


def test_windows_are_exact_on_flash_attn_3() -> None:
    ids, lengths = tokens(1, 30), (13, 17)
    reference = build("mistral", sliding_window=5)
    with hopper("fp8", "flash_attention_3"):
        model = axattn.apply(build("mistral", sliding_window=5), "fp8")
        found = model(ids, position_ids=positions(lengths), use_cache=False).logits
    assert relative(found, alone(reference, ids, lengths)) < 1e-5


def test_a_window_longer_than_every_row_is_none(unrounded: None) -> None:
    model = axattn.apply(build("mistral", sliding_window=64), "fp8", on_unsupported="route")
    with torch.no_grad():
        model(tokens(1, 20))
    assert [layer.planned for layer in axattn.status(model).layers] == ["varlen"] * 2


@torch.no_grad()
def test_a_short_row_under_a_window_does_not_decide_for_a_long_one(unrounded: None) -> None:
    model = axattn.apply(build("mistral", sliding_window=12), "fp8", on_unsupported="route")
    reference = build("mistral", sliding_window=12)
    reference.set_attn_implementation("eager")
    for length, kernel in ((10, "fp8"), (40, "varlen"), (10, "fp8")):
        flash.calls.clear()
        ids = tokens(2, length)
        assert relative(model(ids).logits, reference(ids).logits) < 1e-5
        assert bool(flash.calls) is (kernel == "fp8")


def test_an_interpreter_that_truncates_is_refused_and_so_is_no_triton() -> None:
    from tests.environments import HOPPER, machine

    assert fp8.BACKEND.probe(HOPPER) == []
    (reason,) = fp8.BACKEND.probe(dataclasses.replace(HOPPER, triton_interpret=True))
    assert "TRITON_INTERPRET" in reason.text
    assert reason.fix == "unset TRITON_INTERPRET"
    assert [r.fix for r in fp8.BACKEND.probe(machine("cuda", 90, triton=None))] == ["pip install triton"]


@pytest.mark.parametrize("options", [{"hadamard": "q"}, {"backward": None}, {"group_size": 4}])
def test_options_that_mean_nothing_are_refused(unrounded: None, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match="hadamard"):
        axattn.plan(build("llama"), "fp8", kernel_options=options)


def test_the_cache_is_off_in_the_config_and_comes_back(unrounded: None) -> None:
    model = build("llama")
    assert model.config.use_cache
    axattn.apply(model, "fp8")
    assert not model.config.use_cache
    axattn.restore(model)
    assert model.config.use_cache


def test_a_library_that_fails_is_named_and_the_model_can_go_on(
    unrounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, return_attn_probs: bool = False, **__: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    module = types.ModuleType("fa3_fwd_interface")
    module.flash_attn_varlen_func = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    fp8.varlen_function.cache_clear()
    model = axattn.apply(build("llama"), "fp8")
    with pytest.raises(BackendUnavailableError, match="no kernel image"):
        model(tokens(1, 8))
    axattn.apply(model, "auto")
    assert model(tokens(1, 8)).logits.isfinite().all()


def test_a_build_that_returns_no_logsumexp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of flash-attn 2.8.3, whose hopper/ has no ``return_attn_probs``."""
    with hopper("fp8"):
        older = types.ModuleType("fa3_fwd_interface")
        older.flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q=None: q  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, older.__name__, older)
        model = axattn.apply(build("llama").bfloat16(), "fp8")
        with pytest.raises(BackendUnavailableError, match="returns no logsumexp"):
            model(tokens(1, 8))


# ---- the fake itself ------------------------------------------------------------------------------------


def packed_inputs() -> tuple[list[torch.Tensor], Packed]:
    q, k, v = (torch.randn(10, heads, 32).to(E4M3) for heads in (4, 2, 2))
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    return [q, k, v, *(torch.ones(2, 2) for _ in range(3))], Packed(cu, cu, 6, 6, True, None, 1.0)


Change = Callable[[list[torch.Tensor], Packed], tuple[list[torch.Tensor], Packed]]
REFUSED: dict[str, Change] = {
    "descale is for fp8": lambda parts, packed: ([x.bfloat16() if x.ndim == 3 else x for x in parts], packed),
    "descale must be": lambda parts, packed: ([*parts[:3], *(x[:1] for x in parts[3:])], packed),
    "same dtype": lambda parts, packed: ([parts[0], parts[1].float(), *parts[2:]], packed),
    "multiples of 16": lambda parts, packed: ([*(x[..., :24] for x in parts[:3]), *parts[3:]], packed),
    "longer than max_seqlen": lambda parts, packed: (parts, packed._replace(max_k=5)),
    "local attention": lambda parts, packed: (parts, packed._replace(window=3)),
    "int32": lambda parts, packed: (parts, packed._replace(cu_q=packed.cu_q.long())),
}


@pytest.mark.parametrize("text", REFUSED)
def test_the_fake_refuses_what_the_kernel_refuses(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "varlen_function", lambda: flash.FlashAttention3Forward.flash_attn_varlen_func)
    parts, packed = packed_inputs()
    out, lse = fp8._attention(tuple(parts), packed, 0.0)  # type: ignore[arg-type]  # a list of six
    assert (out.dtype, out.shape, lse.shape) == (torch.bfloat16, (10, 4, 32), (4, 10))
    changed = REFUSED[text](parts, packed)
    with pytest.raises(RuntimeError, match=text):
        fp8._attention(tuple(changed[0]), changed[1], 0.0)  # type: ignore[arg-type]
