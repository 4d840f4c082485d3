"""Gradients that are the same to the bit: the request reaches the kernel, or is refused, or warned of as torch does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import masking_utils

import axattn
from axattn import backends
from axattn.attention.interface import attend
from axattn.documents import native_flash_guard
from axattn.errors import UnsupportedAttentionError
from axattn.masks.mask_interface import lazy_mask
from axattn.planning.routes import ATTRIBUTE, Route
from axattn.spec.capability import Need, missing
from tests.conformance.families import FAMILIES
from tests.environments import machine
from tests.fakes import flash
from tests.fakes.machine import FLASH, hopper
from tests.models import build, tokens

VARIABLE = "FLASH_ATTENTION_DETERMINISTIC"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    mode = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(mode)


def direct(name: str, **kwargs: Any) -> Any:
    """A model that axattn runs on a flash kernel itself: its global layers are too wide for it."""
    return axattn.apply(FAMILIES["gemma4"].make(), name, on_unsupported="route", **kwargs)


def ask(how: str, patch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        patch.setenv(VARIABLE, "1")
    else:
        torch.set_deterministic_debug_mode({"torch": 2, "torch, warn only": 1, "nobody": 0}[how])


@pytest.mark.parametrize("how", ["nobody", "environment", "torch"])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_4"])
def test_direct_calls_pass_it_on(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with hopper(name):
        model = direct(name)
        ask(how, monkeypatch)
        model(tokens(1, 8)).logits.sum().backward()
        assert set(flash.calls) == {name}
        assert set(flash.repeats) == {how != "nobody"}


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_keyword_of_a_layer_reaches_the_kernel_also_inside_a_graph(deterministic: bool) -> None:
    """ModernBERT says ``deterministic=config.deterministic_flash_attn`` to every call."""
    with hopper("flash_attention_2"):
        q, k, v = (torch.randn(1, 2, 6, 16, requires_grad=True) for _ in range(3))
        module = torch.nn.Identity()
        name = "flash_attention_2"
        module.__dict__[ATTRIBUTE] = Route(name, "layer", (name,), name)

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            mask = lazy_mask(1, 6, 6, 0, 0, masking_utils.causal_mask_function, None, device="cpu")
            out, _ = attend(name, module, q, k, v, mask, deterministic=deterministic)
            return out

        for function in (run, torch.compile(run, backend="eager")):
            flash.repeats.clear()
            function(q, k, v).sum().backward()
            assert flash.repeats
            assert set(flash.repeats) == {deterministic}


def test_an_environment_without_gradients_changes_no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    with hopper("flash_attention_3"), torch.no_grad():
        ask("torch", monkeypatch)
        direct("flash_attention_3")(tokens(1, 8))
        assert set(flash.calls) == {"flash_attention_3"}


def test_what_has_no_deterministic_gradient_is_refused_or_another_kernel_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hopper("flash_attention_3"):
        model = direct("flash_attention_3")
        strict = axattn.apply(build("llama"), "auto")
        ask("torch", monkeypatch)
        model(tokens(1, 8)).logits.sum().backward()
        assert not flash.calls
        strict(tokens(1, 8)).logits.sum().backward()
        assert not flash.calls
        ask("torch, warn only", monkeypatch)
        with pytest.warns(UserWarning, match="not every build of hopper/ is deterministic"):
            model(tokens(1, 8)).logits.sum().backward()
        assert set(flash.calls) == {"flash_attention_3"}
        assert set(flash.repeats) == {True}


@pytest.mark.parametrize("name", FLASH)
def test_transformers_own_flash_path_reads_the_environment_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with hopper(name):
        model = axattn.apply(build("llama"), name)
        model(tokens(1, 8)).logits.sum().backward()
        ask("torch", monkeypatch)
        with torch.no_grad():
            model(tokens(1, 8))
        with pytest.raises(UnsupportedAttentionError, match=f"Set {VARIABLE}=1"):
            model(tokens(1, 8))
        ask("torch, warn only", monkeypatch)
        with pytest.warns(UserWarning, match="does not pass torch.use_deterministic_algorithms on"):
            model(tokens(1, 8))
        ask("nobody", monkeypatch)
        ask("environment", monkeypatch)
        flash.repeats.clear()
        if name == "flash_attention_3":
            with pytest.raises(UnsupportedAttentionError, match="not every build of hopper/ is deterministic"):
                model(tokens(1, 8))
            return
        model(tokens(1, 8)).logits.sum().backward()
        assert set(flash.repeats) == {True}


def test_modernbert_is_deterministic_by_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    ask("torch", monkeypatch)
    for deterministic in (False, True):
        config = tf.ModernBertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            pad_token_id=0, deterministic_flash_attn=deterministic,
        )  # fmt: skip
        model = tf.ModernBertModel(config)
        if deterministic:
            native_flash_guard.require_deterministic("flash_attention_2", (), model)
        else:
            with pytest.raises(UnsupportedAttentionError, match=r"Set config\.deterministic_flash_attn=True"):
                native_flash_guard.require_deterministic("flash_attention_2", (), model)


def test_old_versions_of_flash_attn_have_none() -> None:
    need = Need(gradient=True, deterministic=True)
    for version, has in (("2.4.0", False), ("2.4.1", True)):
        served = backends.get("flash_attention_2").capability_on(machine("cuda", 80, flash_attn=version))
        assert (not missing(need, served)) == has
