"""Second derivatives: true, or refused; never left out silently, as torch does."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import axattn
from axattn.errors import UnsupportedAttentionError
from tests.census.scenarios import FAKED
from tests.conformance.families import FAMILIES
from tests.fakes.machine import hopper
from tests.models import build, positions, tokens

LENGTHS = (7, 9, 4)
NAMES = ("auto", "varlen", "s2", *FAKED)


def embeddings(model: Any) -> torch.Tensor:
    ids = tokens(1, sum(LENGTHS))
    found: torch.Tensor = model.get_input_embeddings()(ids).detach().requires_grad_()
    return found


def penalty(model: Any, embeds: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The square of the loss's gradient with respect to the embeddings, with a graph of its own."""
    logits = model(inputs_embeds=embeds, use_cache=False, **inputs).logits
    (gradient,) = torch.autograd.grad(logits.square().mean(), embeds, create_graph=True)
    return gradient.square().sum()


def second(model: Any, **inputs: Any) -> torch.Tensor:
    embeds = embeddings(model)
    return torch.autograd.grad(penalty(model, embeds, **inputs), embeds)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_without_a_second_derivative_refuses_it(name: str) -> None:
    model = build("llama").train()
    with hopper(name) if name in FAKED else contextlib.nullcontext():
        axattn.apply(model, name)
        inputs = {} if name == "s2" else {"position_ids": positions(LENGTHS)}
        embeds = embeddings(model)
        model(inputs_embeds=embeds, use_cache=False, **inputs).logits.square().mean().backward()
        assert embeds.grad.abs().max() > 0  # a first derivative is served
        with pytest.raises(UnsupportedAttentionError, match=r'create_graph=True.*no second gradient.*"eager"'):
            second(model, **inputs)


def test_the_refusal_goes_with_restore() -> None:
    model = build("llama")
    with hopper("flash_attention_2"):
        axattn.apply(model, "flash_attention_2")
        assert any(module._forward_hooks for module in model.modules())
        axattn.restore(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_names_that_others_have_registered_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setitem(registry._global_mapping, "theirs", registry["sdpa"])
    model = FAMILIES["qwen2_5_vl"].make()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "theirs"})
    axattn.apply(model, {"text_config": "varlen"})
    assert model.config.vision_config._attn_implementation == "theirs"
    axattn.apply(build("llama"), "paged|eager")


@pytest.mark.parametrize(("family", "name"), [("gemma2", "auto"), ("gpt_oss", "eager")])
def test_where_eager_runs_second_derivatives_are_those_of_documents_alone(family: str, name: str) -> None:
    """Gemma 2 has a softcap, which no other kernel here serves."""
    stock, model = build(family), build(family)
    stock.set_attn_implementation("eager")
    axattn.apply(model, name)
    packed = {} if name == "eager" else {"position_ids": positions(LENGTHS)}
    lengths = LENGTHS if packed else (sum(LENGTHS),)
    embeds = embeddings(stock)
    logits = [stock(inputs_embeds=part, use_cache=False).logits for part in embeds.split(lengths, 1)]
    (gradient,) = torch.autograd.grad(torch.cat(logits, 1).square().mean(), embeds, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), embeds)
    found = second(model, **packed)
    assert expected.abs().max() > 1e-4
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_whole_rows_keep_what_torch_gives_its_own_kernels() -> None:
    """Its flash kernel raises; its math kernel has a second derivative."""
    stock, model = build("llama"), axattn.apply(build("llama"), "auto")
    stock.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"derivative for .*flash_attention.* is not implemented"):
        second(model)
    expected = second(stock)
    with sdpa_kernel(SDPBackend.MATH):
        found = second(model)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_checkpointed_layers_refuse_it_and_nothing_else() -> None:
    model = build("llama").train()
    axattn.apply(model, "varlen")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    embeds = embeddings(model)
    inputs = {"inputs_embeds": embeds, "position_ids": positions(LENGTHS), "use_cache": False}
    model(**inputs).logits.square().mean().backward()
    assert embeds.grad is not None
    with pytest.raises(UnsupportedAttentionError, match="second gradient"):
        second(model, position_ids=positions(LENGTHS))
