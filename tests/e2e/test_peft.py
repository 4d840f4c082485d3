"""PEFT: adapters of every kind on packed rows, against eager on each document alone; merged, swapped, disabled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import axattn
from axattn.errors import AxattnError, UnsupportedAttentionError
from axattn.hf import forward_inputs
from tests.e2e.test_trainer import padded, train
from tests.models import build, positions, tokens

peft = pytest.importorskip("peft")

LENGTHS = (4, 6, 5)
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "all linear": {"target_modules": "all-linear"},
}


def adapter(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options)


def alone(model: Any) -> torch.Tensor:
    """Logits of each document by itself on the model's own names."""
    ids = tokens(1, sum(LENGTHS))
    return torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)


def packed(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(tokens(1, sum(LENGTHS)), position_ids=positions(LENGTHS)).logits
    return logits


def wrapped(first: str, name: str = "varlen", **options: Any) -> tuple[Any, Any]:
    """(with axattn, the same on eager); `first`: what is done first."""
    made = []
    for attention in (name, None):
        torch.manual_seed(1)
        model = build("llama")
        model.set_attn_implementation("eager")
        if attention and first == "axattn":
            axattn.apply(model, attention)
        model = peft.get_peft_model(model, adapter(**options))
        if attention and first == "peft":
            axattn.apply(model, attention)
        made.append(model)
    return made[0], made[1]


@pytest.mark.parametrize("first", ["axattn", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_keeps_documents_apart_and_gets_its_gradient(kind: str, first: str) -> None:
    model, stock = wrapped(first, **KINDS[kind])
    found, expected = packed(model), alone(stock)
    assert torch.allclose(found, expected, atol=1e-4)
    found.square().sum().backward()
    expected.square().sum().backward()
    trained = [(p, q) for p, q in zip(model.parameters(), stock.parameters(), strict=True) if q.grad is not None]
    assert len(trained) >= 8
    for mine, theirs in trained:
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4 * theirs.grad.abs().max().item())
    assert axattn.status(model).layers[0].served == {"varlen": 1}


@torch.no_grad()
def test_adapters_are_disabled_swapped_merged_and_unloaded_under_the_same_kernel() -> None:
    model, stock = wrapped("axattn")
    for one in (model, stock):
        torch.manual_seed(2)
        one.add_adapter("other", adapter(r=2))
    base = build("llama")
    base.set_attn_implementation("eager")
    with model.disable_adapter():
        assert torch.allclose(packed(model), alone(base), atol=1e-4)
    first = packed(model)
    for one in (model, stock):
        one.set_adapter("other")
    assert torch.allclose(packed(model), alone(stock), atol=1e-4)
    assert not torch.allclose(packed(model), first, atol=1e-2)
    for one in (model, stock):
        one.merge_adapter()
    assert torch.allclose(packed(model), alone(stock), atol=1e-4)
    for one in (model, stock):
        one.unmerge_adapter()
    plain = model.merge_and_unload()
    assert torch.allclose(packed(plain), alone(stock), atol=1e-4)
    assert axattn.status(plain).layers[0].asked == "varlen"
    axattn.restore(plain)
    assert plain.config._attn_implementation == "eager"


@torch.no_grad()
def test_a_saved_adapter_loads_on_any_kernel(tmp_path: Path) -> None:
    model, _ = wrapped("peft")
    expected = packed(model)
    model.save_pretrained(tmp_path)
    assert "axattn" not in (tmp_path / "adapter_config.json").read_text()
    again = peft.PeftModel.from_pretrained(axattn.apply(build("llama"), "auto"), tmp_path)
    assert torch.allclose(packed(again), expected, atol=1e-4)


PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def prompted(kind: str, name: str | None) -> Any:
    torch.manual_seed(1)
    model = build("llama")
    model.set_attn_implementation("eager")
    if name:
        axattn.apply(model, name)
    made = peft.get_peft_model(model, PROMPTS[kind]()).eval()
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    return made


@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("kind", PROMPTS)
@torch.no_grad()
def test_prompts_before_a_row_refuse_packed_documents(kind: str, name: str) -> None:
    """PEFT drops the positions of a row that gets a prompt, with a warning; a prefix is a cache of no document."""
    model = prompted(kind, name)
    said = "packed rows can't continue from a cache" if kind == "prefix" else "did not pass them on"
    ids, where = tokens(1, sum(LENGTHS)), positions(LENGTHS)
    for inputs in ({}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(AxattnError, match=said):
            model(input_ids=ids, position_ids=where, **inputs)
    expected = prompted(kind, None)(input_ids=ids).logits
    for inputs in ({}, {"position_ids": torch.arange(ids.shape[1])[None]}):  # one document is served
        assert torch.allclose(model(input_ids=ids, **inputs).logits, expected, atol=1e-4)


@pytest.mark.parametrize("kind", PROMPTS)
@torch.no_grad()
def test_prompts_before_padded_rows_generate_what_eager_does(kind: str) -> None:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0
    inputs = {"input_ids": tokens(2, 8) * mask, "attention_mask": mask}
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    if kind == "prefix" and forward_inputs.cache_keyword(build("llama")) == "cache":
        # PEFT 0.21 passes the prefix under the old keyword beside the new one, and Transformers 5.24 drops it silently
        with pytest.raises(AxattnError, match="attention_mask has 11 columns, for 8 tokens over a cache of 0"):
            prompted(kind, "auto").generate(**inputs, **greedy)
        return
    expected = prompted(kind, None).generate(**inputs, **greedy)
    assert torch.equal(prompted(kind, "auto").generate(**inputs, **greedy), expected)


class Linear8(torch.nn.Linear):
    """As a k-bit linear layer: whole numbers with a scale, computed in ``compute_dtype``."""

    compute_dtype = torch.bfloat16

    @classmethod
    def of(cls, linear: torch.nn.Linear) -> Linear8:
        made = cls(linear.in_features, linear.out_features, bias=False)
        made.scale = linear.weight.detach().abs().amax() / 127
        made.weight = torch.nn.Parameter((linear.weight.detach() / made.scale).round().to(torch.int8), False)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(self.compute_dtype) * self.scale.to(self.compute_dtype)
        return torch.nn.functional.linear(x.to(self.compute_dtype), weight).to(x.dtype)


def k_bit() -> Any:
    """A model whose linear layers are quantised, prepared by PEFT: norms and embeddings in fp32."""
    model = build("llama").to(torch.bfloat16)
    for layer in model.model.layers:
        for part, linears in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in linears:
                setattr(part, f"{name}_proj", Linear8.of(getattr(part, f"{name}_proj")))
    model.is_loaded_in_8bit = True
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert {prepared.model.norm.weight.dtype, prepared.model.embed_tokens.weight.dtype} == {torch.float32}
    prepared.is_loaded_in_8bit = False  # what follows is for weights of bitsandbytes
    return prepared


def test_a_k_bit_model_trains_with_its_norms_cast_for_the_kernel_and_back() -> None:
    torch.manual_seed(1)
    model = peft.get_peft_model(axattn.apply(k_bit(), "varlen"), adapter())
    axattn.prepare_for_training(model)
    base = model.base_model.model
    assert {base.model.norm.weight.dtype, base.model.embed_tokens.weight.dtype} == {torch.bfloat16}
    dtypes = set()
    inner = base.model.layers[0].self_attn
    inner.o_proj.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
    found = packed(model)
    assert dtypes == {torch.bfloat16}
    torch.manual_seed(1)
    stock = peft.get_peft_model(k_bit(), adapter())
    stock.set_attn_implementation("eager")
    expected = alone(stock)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    found.float().square().sum().backward()
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in lora)
    axattn.restore(model)
    assert {base.model.norm.weight.dtype, base.model.embed_tokens.weight.dtype} == {torch.float32}


def test_a_lora_run_of_trainer_follows_padded_documents(tmp_path: Path) -> None:
    model, stock = wrapped("axattn")
    _, expected = train(tmp_path / "a", stock, padded)
    _, found = train(tmp_path / "b", axattn.prepare_for_training(model))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_a_prefix_that_checkpointing_would_take_away_is_refused_with_its_cause(name: str) -> None:
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = axattn.apply(peft.get_peft_model(build("llama"), prefix), name)
    ids = tokens(2, 6)
    plain = model.eval()(ids).logits
    model.train().base_model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(
        UnsupportedAttentionError, match=r"checkpointing can't serve .* 3 tokens.*checkpointing_disable"
    ):
        model(ids)
    model.base_model.gradient_checkpointing_disable()
    assert torch.allclose(model(ids).logits, plain, atol=1e-5)
