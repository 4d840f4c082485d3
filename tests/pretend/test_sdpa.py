"""What ``F.scaled_dot_product_attention`` is asked for on a GPU: heads that a fused kernel takes, and without cuDNN."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils as mu

import axattn
from axattn import backends
from axattn.attention.short_path import note_of
from axattn.backends import flash_calls, sdpa
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine import packed
from axattn.hf import torch_sdpa
from axattn.masks.mask_interface import lazy_mask
from tests.pretend import matrix
from tests.pretend.machine import two_gpus

HALF = torch.bfloat16
attention: Any = sdpa.attention
switches: Any = torch.backends.cuda  # no types


class Asked(NamedTuple):
    """One call as it reached torch."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    masked: bool
    causal: bool
    grouped: bool
    cudnn: bool


asked: list[Asked] = []
_real = F.scaled_dot_product_attention


def _spy(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    on = switches.cudnn_sdp_enabled()
    asked.append(Asked(tuple(query.shape), tuple(key.shape), attn_mask is not None, is_causal, enable_gqa, on))
    return _real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _flash(params: Any) -> bool:
    """What torch 2.13 checks before it takes FlashAttention 2 (``sdp_utils.cpp``), on Ampere or newer."""
    q, k, v = params.query, params.key, params.value
    square = not params.is_causal or q.shape[2] == k.shape[2]
    size = q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    return params.attn_mask is None and square and size and q.dtype in (torch.float16, HALF)


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(F, "scaled_dot_product_attention", _spy)
    monkeypatch.setattr("axattn.attention.short_path._sdpa", _spy)
    for name, answer in {"flash": _flash, "cudnn": _flash, "efficient": lambda params: False}.items():
        monkeypatch.setattr(switches, f"can_use_{name}_attention", answer)
    asked.clear()
    with two_gpus(), matrix.kernels():
        yield
    assert switches.cudnn_sdp_enabled()


def tensors(S: int, T: int, D: int, dtype: torch.dtype, gradient: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(2, heads, length, D) for heads, length in ((4, S), (2, T), (2, T))]
    return [x.to(dtype).cuda().requires_grad_(gradient) for x in made]


@pytest.mark.parametrize(
    ("S", "D", "dtype", "masked", "form"),
    [
        (12, 64, HALF, False, "grouped"),
        (12, 64, HALF, True, "repeated"),
        (12, 64, torch.float32, False, "repeated"),
        (12, 512, HALF, False, "repeated"),
        (1, 64, HALF, False, "packed"),
        (1, 64, HALF, True, "packed"),
        (1, 512, torch.float32, True, "packed"),
    ],
)
@pytest.mark.parametrize("per_head", [False, True])
def test_grouped_heads_reach_a_fused_kernel(
    S: int, D: int, dtype: torch.dtype, masked: bool, form: str, per_head: bool
) -> None:
    query, key, value = tensors(S, 12, D, dtype, gradient=True)
    mask = (torch.rand(2, 4 if per_head else 1, S, 12) < 0.7).cuda() if masked else None
    if mask is not None:
        mask[..., 0] = True
    out = attention(query, key, value, mask, 0.0, not masked and S > 1, 0.3)
    grads = torch.autograd.grad((out.float() * torch.arange(out.shape[-1], device="cuda")).sum(), (query, key, value))
    shape = {"grouped": (4, 2, S), "repeated": (4, 4, S), "packed": (2, 2, 2)}[form]
    assert (asked[0].query[1], asked[0].key[1], asked[0].query[2]) == shape
    assert asked[0].grouped == (form == "grouped")
    there = [x.detach().cpu().double().requires_grad_() for x in (query, key, value)]
    q, k, v = there[0], *(x.repeat_interleave(2, 1) for x in there[1:])
    scores = (q @ k.transpose(-1, -2)) * 0.3
    seen = mask.cpu() if mask is not None else torch.ones(S, 12, dtype=torch.bool).tril(0 if S > 1 else 12)
    wanted = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    theirs = torch.autograd.grad((wanted * torch.arange(D)).sum(), there)
    budget = 2e-2 if dtype == HALF else 1e-5
    for found, right in zip((out, *grads), (wanted, *theirs), strict=True):
        assert ((found.cpu().double() - right).norm() / right.norm()).item() < budget


def llama(**sizes: Any) -> Any:
    torch.manual_seed(0)
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 64}
    return tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=32, intermediate_size=32, **config, **sizes)).eval()


@pytest.mark.parametrize("name", ["auto", "varlen"])
@pytest.mark.parametrize(("head_dim", "masked"), [(16, True), (512, False)])
def test_no_layer_of_a_model_is_left_to_the_math_kernel(name: str, head_dim: int, masked: bool) -> None:
    """The first layer asks, the next ones take what it noted on the mask: both ways."""
    model = axattn.apply(llama(head_dim=head_dim), name).to("cuda")
    ids = torch.randint(1, 64, (1, 12), device="cuda")
    mask = {"attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool, device="cuda").tril()} if masked else {}
    for _ in range(2):
        model(ids, use_cache=False, **mask)
    assert len(asked) == 6
    assert all(call.key[1] == 4 and not call.grouped for call in asked)


@pytest.mark.parametrize(
    ("T", "masked", "causal", "training", "on"),
    [
        (192, True, False, True, False),
        (192, True, False, False, False),
        (192, False, True, True, True),
        (192, False, False, True, False),
        (256, False, False, True, True),
        (192, False, False, False, True),
    ],
)
def test_cudnn_is_kept_from_what_it_gives_nan_for_and_from_masks(
    T: int, masked: bool, causal: bool, training: bool, on: bool
) -> None:
    query, key, value = tensors(T, T, 8, HALF)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool, device="cuda") if masked else None
    with torch.set_grad_enabled(training):
        attention(query, key, value, mask, 0.0, causal, None)
    assert asked[-1].cudnn == on


def test_cudnn_is_kept_from_a_bidirectional_model_in_training_whichever_layer_asks() -> None:
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    model = axattn.apply(tf.BertModel(tf.BertConfig(vocab_size=64, **sizes)).eval(), "auto").to("cuda")
    ids = torch.randint(1, 64, (1, 64), device="cuda")
    with torch.no_grad():  # what it notes on the mask then serves the training that comes after
        model(ids)
        model(ids)
    asked.clear()
    model(ids)
    assert [call.cudnn for call in asked] == [False] * 3


@pytest.mark.parametrize(("T", "flag", "grouped"), [(192, "full", None), (256, "full", True), (192, "causal", True)])
def test_what_a_layer_notes_on_a_mask_holds_in_training_too(T: int, flag: str, grouped: bool | None) -> None:
    """A mask outlives a forward without gradients: None leaves cuDNN to each call."""
    route: Any = SimpleNamespace(candidates=(), short={(): "varlen"})
    mask: Any = SimpleNamespace(as_flag=flag, notes={})
    with torch.no_grad():
        note: Any = note_of(route, (), mask, *tensors(T, T, 8, HALF))
    assert note.kernel.keywords.get("enable_gqa") is grouped


def test_the_switches_of_the_user_stay() -> None:
    query, key, value = tensors(4, 4, 8, HALF)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="cuda")
    for kernels, on in (
        ([SDPBackend.CUDNN_ATTENTION], True),  # nothing else is left that could run
        ([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], False),
        ([SDPBackend.MATH], False),
    ):
        with sdpa_kernel(kernels):
            before = set(torch.nn.attention._cur_sdpa_kernel_backends())
            attention(query, key, value, mask, 0.0, False, None)
            assert asked[-1].cudnn == on
            assert set(torch.nn.attention._cur_sdpa_kernel_backends()) == before


def test_two_threads_leave_cudnn_as_it_was() -> None:
    """The first to come is the first to go: what ``sdpa_kernel`` would restore then is not what was there."""
    inside, left = threading.Event(), threading.Event()

    def other() -> None:
        with torch_sdpa.without_cudnn():
            inside.set()
            assert left.wait(10)
            seen.append(switches.cudnn_sdp_enabled())

    seen: list[bool] = []
    thread = threading.Thread(target=other)
    with torch_sdpa.without_cudnn():
        thread.start()
        assert inside.wait(10)
    left.set()
    thread.join()
    assert seen == [False]
    assert switches.cudnn_sdp_enabled()


class Attention(torch.nn.Module):
    is_causal = True


KERNELS = {
    "varlen": backends.get("varlen").forward,
    "flash_attention_2": flash_calls.flash_2,
    "flash_attention_3": flash_calls.flash_3,
    "flash_attention_4": flash_calls.flash_4,
    "xformers": backends.get("xformers").forward,
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("padding", "cache"), [(((3, 12), (0, 12)), 12), (((0, 12), (0, 12)), 16), (((0, 5), (0, 9)), 12)]
)
def test_a_step_of_decoding_reads_keys_where_they_lie(
    name: str, window: int | None, padding: tuple[tuple[int, int], ...], cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows padded on the left, a static cache that is not full, rows padded on the right: none is copied together."""

    def never(*_: Any) -> Any:
        raise AssertionError("keys were copied")

    monkeypatch.setattr(packed, "packed", never)
    query, key, value = tensors(1, cache, 8, torch.float32)
    real = torch.zeros(2, cache, dtype=torch.bool)
    for row, (low, high) in enumerate(padding):
        real[row, low:high] = True
    rule = mu.causal_mask_function if window is None else mu.sliding_window_causal_mask_function(window)
    mask = lazy_mask(2, 1, cache, 11, 0, rule, real.cuda(), device=torch.device("cuda:0"))
    call = AttentionCall(Attention(), query, key, value, mask, True, window, 0.3, 0.0, None, None, None, {})
    forward = KERNELS[name]
    assert forward is not None
    with torch.no_grad():
        found = forward(call).cpu()
    assert call.ran == "sdpa"
    q, k, v = query.cpu(), *(x.cpu().repeat_interleave(2, 1) for x in (key, value))
    seen = mask.dense().cpu()
    wanted = ((q @ k.transpose(-1, -2)) * 0.3).masked_fill(~seen, float("-inf")).softmax(-1) @ v
    wanted = wanted.nan_to_num(0.0)  # the window of a row that ended long ago holds no real key
    assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-5)
    assert asked[-1].query[1:3] == (2, 2)
    assert not asked[-1].cudnn
    if padding[0] == padding[1]:
        assert asked[-1].key[2] == min(window or 12, 12)  # the end of the cache, or of the window, is a slice
        assert not asked[-1].masked


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_single_query_is_given_no_causal_rule(name: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a softcap flash kernels run: a rule that hides nothing would keep them from splitting the keys."""
    given: list[dict[str, Any]] = []

    def kernel(q: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        given.append(options)
        return q

    for function in ("varlen_function", "dense_function"):
        monkeypatch.setattr(flash_calls, function, lambda version: kernel)
    for S in (1, 12):
        query, key, value = tensors(S, 12, 8, HALF)
        call = AttentionCall(Attention(), query, key, value, None, True, window, 0.3, 0.0, 5.0, None, None, {})
        forward = KERNELS[name]
        assert forward is not None
        forward(call)
    assert [options["causal"] for options in given] == [False, True]
    assert given[0]["window_size"][0] == given[1]["window_size"][0]
