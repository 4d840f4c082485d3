"""axattn's INT8 kernels in Triton's interpreter: outputs, logsumexps and gradients against exact attention."""

from __future__ import annotations

import itertools
import os
import zlib
from typing import Any

import pytest
import torch

from axattn.backends.varlen_engine.cpu_tiles import attention_over_tiles
from axattn.backends.varlen_engine.flash_backward import Packed
from axattn.kernels.document_statistics import Documents
from axattn.masks.varlen_layout import Layout, Span
from tests.interpreter import INTERPRETED
from tests.sampling import SAMPLE

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter is off (no triton from 3.7 on, or a GPU is there)"
)
FORWARD, GRADIENT = 0.015, 0.02
EVERYTHING = os.environ.get("AXATTN_INT8") == "all"


def packed_of(
    q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], causal: bool, window: int | None, dim: int
) -> Any:
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (q_lengths, k_lengths)
    )
    return Packed(cu_q, cu_k, max(q_lengths), max(k_lengths), causal, window, dim**-0.5)


def made(
    q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, hard: bool
) -> list[torch.Tensor]:
    """Queries, keys, values; `hard`: keys far from zero, and outlier channels."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(q_lengths), heads, dim, generator=generator)
    k, v = (torch.randn(sum(k_lengths), kv_heads, dim, generator=generator) for _ in range(2))
    if hard:
        k += 8 * torch.randn(1, kv_heads, dim, generator=generator)
        k[..., [3, 11]] *= 4
    return [x.requires_grad_() for x in (q, k, v)]


def exact(q: Any, k: Any, v: Any, packed: Packed) -> torch.Tensor:
    edges = zip(
        packed.cu_q.tolist(), packed.cu_q.tolist()[1:], packed.cu_k.tolist(), packed.cu_k.tolist()[1:], strict=False
    )
    spans = tuple(Span(0, 1, *ends) for ends in edges)
    layout = Layout(spans, packed.causal, packed.window, 1, q.shape[0], k.shape[0])
    return attention_over_tiles(*(x.transpose(0, 1)[None] for x in (q, k, v)), layout, packed.scale)[0]


def attention_output(
    q: Any, k: Any, v: Any, packed: Packed, exact_backward: bool = False, softcap: float = 0.0
) -> torch.Tensor:
    from axattn.backends import int8_operator
    from axattn.kernels.int8_attention import query_blocks

    q_lengths, k_lengths = (tuple((cu[1:] - cu[:-1]).tolist()) for cu in (packed.cu_q, packed.cu_k))
    blocks = query_blocks(q_lengths, int8_operator.block_of(q), q.device)
    keys = None if softcap else Documents(k_lengths, q.device)
    return int8_operator.attention(q, k, v, packed, blocks, keys, softcap, exact_backward)[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-6)).item()


LENGTHS = (1, 63, 64, 65, 200, 1000)
SIZES = (64, 80, 96, 128, 256)
ALL = list(itertools.product(LENGTHS, SIZES, (True, False), (None, 50), (False, True), (False, True), (False, True)))


def taken(case: tuple[Any, ...]) -> bool:
    """A fixed share of the cases, the fewer the longer they take."""
    share = (120 if case[0] == 1000 else 12 if case[0] == 200 else 5) * (1 if SAMPLE == "nightly" else 6)
    return EVERYTHING or zlib.crc32(repr(case).encode()) % share == (0 if SAMPLE == "nightly" else 1)


@pytest.mark.parametrize(("length", "dim", "causal", "window", "many", "grouped", "hard"), [c for c in ALL if taken(c)])
def test_output_and_gradients_are_within_their_budget(
    length: int, dim: int, causal: bool, window: int | None, many: bool, grouped: bool, hard: bool
) -> None:
    lengths = (length, 7, max(length // 2, 1)) if many else (length,)
    packed = packed_of(lengths, lengths, causal, window, dim)
    inputs = made(lengths, lengths, 2, 1 if grouped else 2, dim, hard)
    out, wanted = attention_output(*inputs, packed), exact(*inputs, packed)
    assert relative(out, wanted) < FORWARD
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((out * weight).sum(), inputs)
    truth = torch.autograd.grad((wanted * weight).sum(), inputs)
    scale = max(x.norm().item() for x in truth)
    for name, a, b in zip("qkv", found, truth, strict=True):
        assert torch.isfinite(a).all(), name
        if b.norm() > 1e-3 * scale:  # with one key a query has nothing to choose: dq and dk are rounding
            assert relative(a, b) < GRADIENT, name


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), [((3, 5), (40, 70)), ((1, 64), (130, 64)), ((65,), (200,))])
def test_queries_fewer_than_keys_are_the_last_ones(
    q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], window: int | None
) -> None:
    packed = packed_of(q_lengths, k_lengths, True, window, 64)
    inputs = made(q_lengths, k_lengths, 4, 2, 64, False)
    assert relative(attention_output(*inputs, packed), exact(*inputs, packed)) < FORWARD


def test_the_exact_backward_is_exact() -> None:
    packed = packed_of((50, 30), (50, 30), True, None, 64)
    inputs = made((50, 30), (50, 30), 4, 2, 64, True)
    weight = torch.randn(80, 4, 64)
    found = torch.autograd.grad((attention_output(*inputs, packed, exact_backward=True) * weight).sum(), inputs)
    truth = torch.autograd.grad((exact(*inputs, packed) * weight).sum(), inputs)
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, truth, strict=True))


def test_the_logsumexp_is_that_of_the_smoothed_problem() -> None:
    from axattn.kernels import int8_attention

    packed = packed_of((40,), (40,), True, None, 64)
    q, k, v = (x.detach() for x in made((40,), (40,), 2, 2, 64, True))
    keys = Documents((40,), q.device)
    rounded = int8_attention.quantise(k, keys.mean(k), keys.document_ids)
    assert torch.allclose(rounded.smooth, k - k.mean(0), atol=1e-4)
    cut = int8_attention.tuning(64, None)
    blocks = int8_attention.query_blocks((40,), cut.block_m, q.device)
    options: Any = {"cut": cut, "causal": True, "window": None, "softcap": 0.0, "scale": packed.scale}
    _, lse = int8_attention.forward(int8_attention.quantise(q), rounded, v, packed.cu_q, packed.cu_k, blocks, **options)
    logits = torch.einsum("shd,thd->hst", q, rounded.smooth) * packed.scale
    wanted = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).logsumexp(-1)
    assert (lse - wanted).abs().max() < 0.15  # logits here reach 20


@pytest.mark.parametrize("window", [None, 20])
def test_softcap(window: int | None) -> None:
    packed = packed_of((70, 30), (70, 30), True, window, 64)
    q, k, v = (x.detach() for x in made((70, 30), (70, 30), 2, 2, 64, False))
    q = q * 4
    outs = []
    for a, b in ((0, 70), (70, 100)):
        logits = torch.einsum("shd,thd->hst", q[a:b], k[a:b]) * packed.scale
        logits = 5.0 * torch.tanh(logits / 5.0)
        index = torch.arange(b - a)
        seen = (index <= index[:, None]) & (index > index[:, None] - (window or 1000))
        outs.append(torch.einsum("hst,thd->shd", logits.masked_fill(~seen, float("-inf")).softmax(-1), v[a:b]))
    assert (
        relative(attention_output(q, k, v, packed, softcap=5.0), torch.cat(outs)) < 0.03
    )  # logits four times as large
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match="softcap"):
        attention_output(q, k, v, packed, softcap=5.0)


@pytest.mark.parametrize("dim", [8, 16, 24, 32, 48, 112, 200])
def test_other_head_dims(dim: int) -> None:
    packed = packed_of((33, 12), (33, 12), True, None, dim)
    inputs = made((33, 12), (33, 12), 2, 1, dim, False)
    assert relative(attention_output(*inputs, packed), exact(*inputs, packed)) < FORWARD


def test_documents_do_not_see_each_other_bit_for_bit() -> None:
    packed = packed_of((30, 70, 20), (30, 70, 20), True, None, 64)
    inputs = [x.detach() for x in made((30, 70, 20), (30, 70, 20), 2, 1, 64, True)]
    before = attention_output(*inputs, packed)
    for x in inputs:
        x[40:60] = 1e4
    inputs[1][50] = float("inf")
    after = attention_output(*inputs, packed)
    assert torch.equal(before[:30], after[:30])
    assert torch.equal(before[100:], after[100:])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_rounded_away(part: int, value: float) -> None:
    packed = packed_of((20,), (20,), True, None, 64)
    inputs = [x.detach() for x in made((20,), (20,), 2, 2, 64, False)]
    inputs[part][7, :, 5] = value
    out = attention_output(*inputs, packed)
    assert not torch.isfinite(out[7]).all()


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_tiny_queries_and_keys_give_the_mean_of_the_values(value: float) -> None:
    packed = packed_of((5,), (5,), False, None, 64)
    v = torch.randn(5, 2, 64)
    keys = torch.zeros(5, 2, 64)
    keys[1] = value
    out = attention_output(torch.full((5, 2, 64), value), keys, v, packed)
    assert torch.allclose(out, v.mean(0).expand(5, 2, 64), atol=1e-5)


def test_the_operator_keeps_its_promises_to_torch() -> None:
    from axattn.backends import int8_operator
    from axattn.kernels.int8_attention import query_blocks

    packed = packed_of((9, 5), (9, 5), True, None, 64)
    inputs = made((9, 5), (9, 5), 2, 1, 64, False)
    keys = Documents((9, 5), inputs[0].device)
    blocks = query_blocks((9, 5), int8_operator.block_of(inputs[0]), inputs[0].device)
    arguments = (*inputs, keys.mean(inputs[1].detach()), keys.document_ids, packed.cu_q, packed.cu_k, blocks)
    rest = (packed.max_q, packed.max_k, True, None, packed.scale, 0.0, False)
    torch.library.opcheck(
        int8_operator.int8_attention_op,
        (*arguments, *rest),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_inputs_whose_rows_are_not_eight_values_apart() -> None:
    """Kernels read eight values at a time; what lies otherwise in memory is copied first, or refused by the kernel."""
    from axattn.kernels import int8_attention

    packed = packed_of((33, 12), (33, 12), True, None, 64)
    inputs = [x.detach() for x in made((33, 12), (33, 12), 2, 1, 64, False)]
    odd = [torch.nn.functional.pad(x, (0, 3))[..., :64] for x in inputs]
    assert odd[0].stride() == (134, 67, 1)
    assert torch.equal(attention_output(*odd, packed), attention_output(*inputs, packed))
    wide = [torch.cat([x, x], -1)[..., 64:] for x in inputs]  # as a fused projection gives them: read where they lie
    assert int8_attention.aligned_to_8(wide[0]) is wide[0]
    assert torch.equal(attention_output(*wide, packed), attention_output(*inputs, packed))
    for x in (odd[0], torch.zeros(5, 2, 12), inputs[0].transpose(1, 2)):
        with pytest.raises(ValueError, match="eight values at a time"):
            int8_attention.quantise(x)
