from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import axattn
from axattn.patches.dtype import compute_dtype
from axattn.training import needs_dtype_cast
from tests.documents.test_input_hook import qwen_vl
from tests.models import build, tokens


def test_the_cache_is_off_on_every_sub_config_and_comes_back() -> None:
    model = qwen_vl()
    model.config.text_config.use_cache = True
    axattn.prepare_for_training(model)
    assert not model.config.text_config.use_cache
    axattn.restore(model)
    assert model.config.text_config.use_cache


def test_what_was_prepared_holds_on_another_kernel_and_after_it() -> None:
    model = build("llama")
    axattn.prepare_for_training(model)
    axattn.apply(model, "varlen")
    assert not model.config.use_cache
    axattn.prepare_for_training(axattn.apply(model, "auto"))
    with axattn.using(model, "eager"):
        assert not model.config.use_cache
    assert not model.config.use_cache
    with pytest.raises(axattn.BackendUnavailableError):
        axattn.apply(model, "flash_attention_2")
    assert not model.config.use_cache
    assert axattn.status(model).running == {"": "auto"}
    axattn.restore(model)
    assert model.config.use_cache
    assert axattn.apply(model, "auto").config.use_cache


def test_a_change_of_kernel_that_fails_late_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    step = model._axattn_state.later[0]

    def failing(base: Any) -> None:
        if base.config._attn_implementation == "auto":
            raise RuntimeError("no")
        step(base)

    model._axattn_state.later[0] = failing
    with pytest.raises(RuntimeError, match="no"):
        axattn.apply(model, "auto")
    assert axattn.status(model).running == {"": "varlen"}
    assert not model.config.use_cache
    assert torch.isfinite(model(tokens(1, 5)).logits).all()
    axattn.restore(model)
    assert model.config.use_cache


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_prepared_model_s_copies_can_be_switched_too(clone: Any) -> None:
    try:
        clone(build("llama"))
    except AttributeError as error:  # Transformers 5.17 puts local classes into models when kernels is installed
        pytest.skip(f"Transformers' own model can't be cloned so: {error}")
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    one = clone(model)
    assert not axattn.apply(one, "auto").config.use_cache
    assert axattn.restore(one).config.use_cache
    assert not model.config.use_cache


def stray(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.dtype == torch.float32}


def test_stray_fp32_embeddings_and_norms_are_cast_where_the_kernel_needs_it() -> None:
    model = build("llama").to(torch.bfloat16)
    model.model.embed_tokens.float()
    model.model.norm.float()
    expected = stray(model)
    assert expected
    axattn.apply(model, "sdpa")
    axattn.prepare_for_training(model)
    assert stray(model) == expected  # sdpa needs no cast
    axattn.apply(model, "varlen")
    assert needs_dtype_cast(model)
    axattn.prepare_for_training(model)
    assert not stray(model)
    axattn.restore(model)
    assert stray(model) == expected


def test_an_fp32_model_stays_fp32() -> None:
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert compute_dtype(model) is None


def test_linear_layers_are_never_cast_but_for_the_head_that_reads_the_last_norm() -> None:
    model = axattn.apply(build("llama").to(torch.bfloat16), "varlen")
    gate = model.model.layers[0].mlp.gate_proj
    for module in (model.lm_head, model.model.norm, gate):
        module.float()
    axattn.prepare_for_training(model)
    assert gate.weight.dtype == torch.float32
    assert {model.lm_head.weight.dtype, model.model.norm.weight.dtype} == {torch.bfloat16}
    gate.to(torch.bfloat16)
    assert model(tokens(1, 5)).logits.dtype == torch.bfloat16  # the head takes what the norm gives


def test_a_k_bit_model_is_cast_to_what_its_layers_compute_in() -> None:
    class Quantised(torch.nn.Module):
        """As bitsandbytes' linears: byte weights and a compute dtype."""

        compute_dtype = torch.bfloat16

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)

    model = axattn.apply(build("llama"), "varlen")
    for layer in model.model.layers:
        layer.mlp = Quantised()
        layer.self_attn.q_proj = Quantised()
    assert compute_dtype(model) == torch.bfloat16
    axattn.prepare_for_training(model)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_model_axattn_never_touched_can_be_prepared_and_restored() -> None:
    model = build("llama")
    axattn.prepare_for_training(model)
    assert not model.config.use_cache
    axattn.restore(model)
    assert model.config.use_cache
    assert "_axattn_state" not in vars(model)


@pytest.mark.parametrize("first", ["peft", "axattn"])
def test_peft_models_are_prepared_train_and_keep_their_documents_apart(first: str) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = build("llama")
    if first == "axattn":
        axattn.apply(model, "varlen")
    wrapped = peft.get_peft_model(model, lora)
    if first == "peft":
        axattn.apply(wrapped, "varlen")
    axattn.prepare_for_training(wrapped).train()
    assert not model.config.use_cache
    ids = tokens(1, 10)
    packed = wrapped(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])).logits
    alone = torch.cat([wrapped(ids[:, :4]).logits, wrapped(ids[:, 4:]).logits], 1)
    assert torch.allclose(packed, alone, atol=1e-4)
    packed.sum().backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert grads
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads)
    axattn.restore(wrapped)
    assert model.config._attn_implementation == "sdpa"
