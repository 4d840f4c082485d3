from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import axattn
from axattn.attention.interface import attend
from axattn.backends import s2, sdpa
from axattn.backends.s2 import grouped
from axattn.errors import InvalidConfigError, UnsupportedAttentionError
from axattn.masks.mask_interface import lazy_mask
from axattn.masks.varlen_layout import Layout, Span
from tests.models import alone, build, positions, tokens


class Attention(torch.nn.Module):
    is_causal = True


def qkv(length: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, length, 8, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def from_the_paper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """Each half of the heads within groups (S / 4, rounded up), the second half's shifted by half a group; causal."""
    S = q.shape[2]
    group = -(-S // 4) if group is None else group
    index = torch.arange(S)
    outs = []
    for half, number in ((0, index // group), (1, (index + group - group // 2) // group)):
        mask = (number[:, None] == number[None, :]) & (index[:, None] >= index[None, :])
        part = [x.chunk(2, dim=1)[half] for x in (q, k, v)]
        outs.append(F.scaled_dot_product_attention(*part, attn_mask=mask, enable_gqa=True))
    return torch.cat(outs, 1).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 16, 17, 30, 33])
def test_training_equals_the_papers_definition_forward_and_backward(length: int) -> None:
    inputs = qkv(length)
    out, _ = attend("s2", Attention().train(), *inputs, lazy_mask(2, length, length))
    expected = from_the_paper(*inputs)
    assert torch.allclose(out, expected, atol=1e-6)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("length", [1, 7, 16, 30])
def test_without_a_kernel_over_spans_it_is_still_the_papers(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on a GPU: what torch's flash kernel does not take runs under a dense mask."""
    monkeypatch.setattr(s2, "over_layout", lambda part, _: sdpa.sdpa(part))
    inputs = qkv(length)
    out, _ = attend("s2", Attention().train(), *inputs, lazy_mask(2, length, length))
    assert torch.allclose(out, from_the_paper(*inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "group"), [(2, 2), (3, 3), (7, 7), (30, 30), (100, 100), (0.5, 15), (0.3, 9), (1.0, 30)]
)
def test_the_group_size_is_the_users_choice(given: float, group: int) -> None:
    model = axattn.apply(build("llama", num_hidden_layers=1), "s2", kernel_options={"group_size": given}).train()
    module, inputs = model.model.layers[0].self_attn, qkv(30)
    out, _ = attend("s2", module, *inputs, lazy_mask(2, 30, 30))
    assert torch.allclose(out, from_the_paper(*inputs, group), atol=1e-6)


@pytest.mark.parametrize("given", [0, 1, -4, 0.0, 1.5, "512", None, True])
def test_a_group_size_that_means_nothing_is_refused(given: object) -> None:
    model = build("llama")
    before = model.config._attn_implementation
    with pytest.raises(InvalidConfigError, match=r"group_size=.*share of the row"):
        axattn.apply(model, "s2", kernel_options={"group_size": given})
    assert model.config._attn_implementation == before


def test_nothing_wraps_around_from_the_end_of_a_row_to_its_start() -> None:
    inputs = qkv(16)
    module = Attention().train()
    before, _ = attend("s2", module, *inputs, lazy_mask(2, 16, 16))
    changed = [x.detach().clone() for x in inputs]
    for x in changed[1:]:
        x[:, :, 14:] += 1
    after, _ = attend("s2", module, *changed, lazy_mask(2, 16, 16))
    assert torch.equal(before[:, :14], after[:, :14])


@torch.no_grad()
def test_evaluation_is_full_attention() -> None:
    model = build("llama")
    ids = tokens(1, 20)
    expected = alone(model, ids, (20,))
    axattn.apply(model, "s2")
    assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    model.train()
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize(("heads", "kv_heads", "part"), [(4, 1, "1 KV heads"), (3, 3, "3 query heads")])
def test_heads_that_can_not_be_halved_are_refused(heads: int, kv_heads: int, part: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match=part):
        attend("s2", Attention().train(), *qkv(8, heads, kv_heads), lazy_mask(2, 8, 8))


def test_packed_rows_are_refused() -> None:
    model = axattn.apply(build("llama"), "s2")
    with pytest.raises(UnsupportedAttentionError, match="segments"):
        model(tokens(1, 10), position_ids=positions((4, 6)))


def test_padding_keeps_its_groups() -> None:
    layout = Layout((Span(0, 1, 3, 16, 3, 16),), True, None, 1, 16, 16)
    assert [(s.q0, s.q1) for s in grouped(layout, 4, 0).spans] == [(3, 4), (4, 8), (8, 12), (12, 16)]
    assert [(s.q0, s.q1) for s in grouped(layout, 4, 2).spans] == [(3, 6), (6, 10), (10, 14), (14, 16)]
