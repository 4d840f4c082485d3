"""What others put between axattn and a model: hooks that change inputs, wrappers of ``forward``, subclasses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from tests.conformance.families import FAMILIES
from tests.models import alone, build, positions, tokens

LENGTHS = (8, 5)


def by_hook(model: Any, added: dict[str, Any]) -> None:
    hook = lambda _, args, kwargs: (args, {**kwargs, **added})  # noqa: E731
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)


def by_wrapper(model: Any, added: dict[str, Any]) -> None:
    inner = model.base_model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **{**kwargs, **added})

    model.base_model.forward = forward


def by_subclass(model: Any, added: dict[str, Any]) -> None:
    cls: Any = type(model.base_model)

    class Adding(cls):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **{**kwargs, **added})

    model.base_model.__class__ = Adding


WAYS = [by_hook, by_wrapper, by_subclass]
Way = Callable[[Any, dict[str, Any]], None]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_positions_that_come_after_the_input_hook_keep_documents_apart(family: str, way: Way, when: str) -> None:
    model, ids = build(family), tokens(1, sum(LENGTHS))
    added = {"position_ids": positions(LENGTHS)}
    for step in (way, axattn.apply)[:: 1 if when == "before" else -1]:
        step(model, added if step is way else "auto")  # type: ignore[arg-type]
    expected = alone(build(family), ids, LENGTHS)
    for given in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
        assert torch.allclose(model(ids, **given).logits, expected, atol=1e-4)
    with pytest.raises(axattn.AxattnError, match="filled by a row of several documents"):
        model(tokens(1, 1), past_key_values=model(ids).past_key_values)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
@torch.no_grad()
def test_native_names_guard_what_comes_after_the_input_hook(name: str, way: Way) -> None:
    model, ids = axattn.apply(build("llama"), name), tokens(1, sum(LENGTHS))
    way(model, {"position_ids": positions(LENGTHS)})
    with pytest.raises(axattn.UnsupportedAttentionError, match=f"would leak on {name}: with use_cache on"):
        model(ids)
    assert torch.allclose(model(ids, use_cache=False).logits, alone(build("llama"), ids, LENGTHS), atol=1e-4)
    axattn.restore(model)
    attention = model.model.layers[0].self_attn
    assert not attention._forward_pre_hooks


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("added", ["lengths", "document ids", "other positions", "unpadded"])
def test_what_comes_too_late_for_everything_that_reads_it_is_refused(added: str, way: Way) -> None:
    ids, given = tokens(1, 13), {}
    model = axattn.apply(build("llama"), "varlen", unpad=added == "unpadded").train()
    cu = torch.tensor([0, 8, 13], dtype=torch.int32)
    new: dict[str, Any] = {"lengths": {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}}.get(added, {})
    if added == "document ids":
        new = {"attention_mask": torch.tensor([[1] * 8 + [2] * 5])}
    elif added == "other positions":
        new, given = {"position_ids": positions((6, 7))}, {"position_ids": positions(LENGTHS)}
    elif added == "unpadded":
        new, given = (
            {"position_ids": positions(LENGTHS)[:, :10]},
            {"attention_mask": torch.tensor([[1] * 10 + [0] * 3])},
        )
    way(model, new)
    with pytest.raises(axattn.InvalidInputError, match=r"a hook or a wrapper of \w+\.forward gave it"):
        model(ids, **given)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@torch.no_grad()
def test_native_names_guard_a_mask_that_a_model_makes_anew_under_its_own_name(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = axattn.apply(tf.BertModel(tf.BertConfig(vocab_size=97, **sizes)).eval(), name)
    document_ids = torch.tensor([[1] * 8 + [2] * 5])
    model.register_forward_pre_hook(lambda _, a, k: (a, {**k, "attention_mask": document_ids}), with_kwargs=True)
    with pytest.raises(axattn.UnsupportedAttentionError, match=f"would leak on {name}"):
        model(tokens(1, 13))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@torch.no_grad()
def test_native_names_guard_a_model_that_makes_masks_for_an_inner_one(name: str) -> None:
    model = axattn.apply(FAMILIES["gemma3_vl"].make(), name)
    given = {"position_ids": positions(LENGTHS), "attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)}
    model.model.register_forward_pre_hook(lambda _, a, k: (a, {**k, **given}), with_kwargs=True)
    with pytest.raises(axattn.UnsupportedAttentionError, match=f"would leak on {name}"):
        model(tokens(1, sum(LENGTHS)).clamp(max=80))


@pytest.mark.parametrize("name", ["auto", "eager"])
@torch.no_grad()
def test_documents_that_come_after_a_layer_that_runs_by_document_are_refused(name: str) -> None:
    model = axattn.apply(build("lfm2"), name)  # its convolution has run when its attention is reached
    model.model.register_forward_pre_hook(
        lambda _, a, k: (a, {**k, "position_ids": positions(LENGTHS)}), with_kwargs=True
    )
    # (on the oldest Transformers packed rows are refused in this family, whoever passes the positions)
    with pytest.raises(axattn.AxattnError, match=r"gave it position_ids|packed rows can't run in Lfm2Model"):
        model(tokens(1, sum(LENGTHS)), use_cache=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "opt", "roberta"])
@torch.no_grad()
def test_hooks_that_change_nothing_are_no_reason_to_refuse(family: str, name: str, way: Way) -> None:
    if family == "roberta":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = tf.RobertaConfig(vocab_size=97, max_position_embeddings=64, **sizes, is_decoder=True)
        torch.manual_seed(0)
        model: Any = tf.RobertaForCausalLM._from_config(config, attn_implementation="eager").eval()
    else:
        model = build(family)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    way(axattn.apply(model, name), {})
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    real = mask.bool()
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "use_cache": False}):
        found, expected = model(ids, **given).logits, reference(ids, **given).logits
        assert torch.allclose(found[real], expected[real], atol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
