"""A forward checks its model's state again when anything of it has changed since the last one."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import axattn
from axattn.documents import model_state
from axattn.errors import AxattnError, InvalidInputError, RegistrationError, UnsupportedAttentionError
from axattn.hf import watched
from axattn.hf.registries import interfaces
from tests.faults import Patch, fault
from tests.models import build, positions, tokens

IDS = tokens(1, 10)
Change = Callable[[Any, Patch], None]


def _another(*given: Any, **keywords: Any) -> Any:
    raise AssertionError("the other package's function ran")


def _attention_registered_by_another_package(model: Any, patch: Patch) -> None:
    patch.setitem(interfaces()[0]._global_mapping, "varlen", _another)


def _attention_set_on_the_shared_instance(model: Any, patch: Patch) -> None:
    patch.setitem(interfaces()[0]._local_mapping, "varlen", _another)


def _masks_registered_by_another_package(model: Any, patch: Patch) -> None:
    patch.setitem(interfaces()[1]._global_mapping, "varlen", _another)


def _masks_set_on_the_shared_instance(model: Any, patch: Patch) -> None:
    patch.setitem(interfaces()[1]._local_mapping, "varlen", _another)


def _a_name_removed(model: Any, patch: Patch) -> None:
    patch.delitem(interfaces()[0]._global_mapping, "varlen")


def _layer(model: Any) -> Any:
    return model.model.layers[1].self_attn


def _a_layer_given_a_config_on_another_name(model: Any, patch: Patch) -> None:
    _layer(model).config = copy.deepcopy(model.config)
    _layer(model).config._attn_implementation = "flex_attention"


def _a_layer_exchanged_for_one_on_another_name(model: Any, patch: Patch) -> None:
    attention = copy.deepcopy(_layer(model))
    attention.config._attn_implementation = "flex_attention"
    model.model.layers[1].self_attn = attention


def _a_layer_added_on_another_name(model: Any, patch: Patch) -> None:
    layer = copy.deepcopy(model.model.layers[1])
    layer.self_attn.config._attn_implementation = "flex_attention"
    model.model.layers.append(layer)


def _torch_s_context_parallel_begun(model: Any, patch: Patch) -> None:
    def context_parallel(*given: Any, **keywords: Any) -> Any:
        raise AssertionError("ran")

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", context_parallel)


REFUSED: dict[Change, type[AxattnError]] = {
    _attention_registered_by_another_package: RegistrationError,
    _attention_set_on_the_shared_instance: RegistrationError,
    _masks_registered_by_another_package: RegistrationError,
    _masks_set_on_the_shared_instance: RegistrationError,
    _a_name_removed: RegistrationError,
    _a_layer_given_a_config_on_another_name: UnsupportedAttentionError,
    _a_layer_exchanged_for_one_on_another_name: UnsupportedAttentionError,
    _a_layer_added_on_another_name: UnsupportedAttentionError,
    _torch_s_context_parallel_begun: UnsupportedAttentionError,
}


def _named(change: Change) -> str:
    return change.__name__.strip("_").replace("_", " ")


def _patched(name: str = "varlen") -> Any:
    """A model whose forward is given only tokens, and has run: the next one has nothing to check."""
    model = axattn.apply(build("llama").eval(), name)
    for _ in range(2):
        model(IDS)
    return model


@torch.no_grad()
@pytest.mark.parametrize("change", REFUSED, ids=_named)
def test_a_change_between_two_forwards_is_refused(change: Change, monkeypatch: Patch) -> None:
    model = _patched()
    with monkeypatch.context() as patch:
        change(model, patch)
        for _ in range(2):
            with pytest.raises(REFUSED[change]):
                model(IDS)
    if change.__name__.startswith("_a_layer"):
        return
    model(IDS)  # it was put back


@torch.no_grad()
def test_weights_set_in_the_config_are_returned() -> None:
    model = _patched("auto")
    assert model(IDS).attentions is None
    model.config._output_attentions = True
    assert [tuple(weights.shape) for weights in model(IDS).attentions] == [(1, 4, 10, 10)] * len(model.model.layers)


def _a_hook(inner: Any, add: Callable[..., Any]) -> None:
    inner.register_forward_pre_hook(add, with_kwargs=True)


def _a_forward(inner: Any, add: Callable[..., Any]) -> None:
    original = type(inner).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = add(self, args, kwargs)
        return original(self, *args, **kwargs)

    inner.forward = types.MethodType(forward, inner)


@torch.no_grad()
@pytest.mark.parametrize("put", [_a_hook, _a_forward], ids=_named)
def test_documents_that_code_added_later_gives_the_forward_are_kept_apart(put: Callable[..., None]) -> None:
    def add(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": positions((4, 6))}

    model = _patched()
    wanted = model(IDS, position_ids=positions((4, 6))).logits
    put(model.model, add)
    torch.testing.assert_close(model(IDS).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("put", [_a_hook, _a_forward], ids=_named)
def test_lengths_that_code_added_later_gives_the_forward_are_refused(put: Callable[..., None]) -> None:
    def add(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "cu_seq_lens_q": torch.tensor([0, 4, 10], dtype=torch.int32)}

    model = _patched()
    put(model.model, add)
    with pytest.raises(InvalidInputError, match="cu_seq_lens_q"):
        model(IDS)


@torch.no_grad()
def test_a_forward_with_more_than_tokens_is_read() -> None:
    model = _patched("auto")
    with pytest.raises(InvalidInputError, match="position_ids"):
        model(IDS, position_ids=torch.zeros(3, 10, dtype=torch.long))
    with pytest.raises(InvalidInputError, match="the batch is empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
    assert model(IDS, output_attentions=True).attentions is not None
    assert model(IDS).attentions is None


@torch.no_grad()
def test_documents_in_a_mask_are_found_after_forwards_without_any() -> None:
    model = _patched()
    wanted = model(IDS, position_ids=positions((4, 6))).logits
    ones = torch.ones_like(IDS)
    torch.testing.assert_close(model(IDS, attention_mask=ones).logits, model(IDS).logits)
    document_ids = torch.tensor([[1] * 4 + [2] * 6])
    torch.testing.assert_close(model(IDS, attention_mask=document_ids).logits, wanted)
    padded = torch.cat((IDS[:, :3].flip(1), IDS), 1)
    mask = torch.cat((torch.zeros_like(IDS[:, :3]), ones), 1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], model(IDS).logits)


@fault("a change of a model's state between two forwards is refused")
def the_state_of_a_model_is_checked_once(patch: Patch) -> None:
    patch.setattr(watched.Watched, "unchanged", lambda self: True)


@torch.no_grad()
def test_a_state_that_is_checked_once_is_found_out(monkeypatch: Patch) -> None:
    model = _patched()
    the_state_of_a_model_is_checked_once(monkeypatch)
    _attention_registered_by_another_package(model, monkeypatch)
    with pytest.raises(AssertionError, match="the other package's function ran"):
        model(IDS)


def test_a_copy_checks_its_own_state() -> None:
    model = _patched()
    state = next(iter(model.model._forward_pre_hooks.values())).__self__.state
    assert state.unchanged()
    assert not copy.deepcopy(state).unchanged()
    assert isinstance(copy.deepcopy(model).model, type(model.model))
    assert isinstance(state, model_state.ModelState)
