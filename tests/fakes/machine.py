"""Pretends that this machine has a Hopper GPU with flash kernels: strict fakes stand in, tensors stay on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as fa
import transformers.modeling_utils
from transformers import PreTrainedModel

import axattn.kernels
from axattn import backends
from axattn.backends import flash_calls, fp8
from axattn.machine.environment import Environment
from axattn.spec.capability import Capability, Refused
from tests.environments import machine
from tests.fakes import flash, fp8_quantiser, torchao

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
FAKED = (*FLASH, "xformers", "fp8", "sage")


@contextlib.contextmanager
def hopper(*installed: str, sm: int = 90) -> Iterator[Environment]:
    """A Hopper machine with these kernels, as fakes, on which float32 stands for 16 bit (see `tests.fakes.flash`).

    Another architecture for what the records say of it.
    """
    keys = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_3", "flash_attention_4": "flash_attn_4"}
    absent: dict[str, Any] = {key: None for name, key in keys.items() if name not in installed}
    if "xformers" not in installed:
        absent["xformers"] = None
    if "fp8" in installed:
        absent["fa3_fwd"] = "0.0.3"
    environment = machine("cuda", sm, **absent)
    with pytest.MonkeyPatch.context() as patch, flash.sharp():
        if "xformers" in installed:
            import xformers.ops  # before the fakes of flash: it would look into them
        _modules(patch, installed)
        for number in (2, 3, 4):
            there = f"flash_attention_{number}" in installed
            patch.setattr(fa, f"is_flash_attn_{number}_available", lambda *_, there=there, **__: there)
        patch.setattr(fa, "_loaded_implementation", None)
        patch.setattr(transformers.modeling_utils, "is_kernels_available", lambda *_, **__: False)
        patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
        patch.setattr(Environment, "current", classmethod(lambda cls: environment))
        real = backends.get

        def widened(name: str) -> Any:
            found = real(name)
            if name not in FAKED:
                return found
            served = found.capability

            def wider(capability: Capability) -> Capability:
                here: dict[str, Any] = {
                    "devices": capability.devices | {"cpu"},
                    "dtypes": capability.dtypes | {"float32"},
                }
                kept = [refused for refused in capability.refuses if refused.dtypes != {"float32"}]
                here["refuses"] = tuple(_in_float32(refused) for refused in kept)
                multiple = min(8, capability.head_dim_multiple)  # the matrix's heads are small
                return dataclasses.replace(capability, head_dim_multiple=multiple, **here)

            on = None if found.on is None else (lambda machine: wider(found.on(machine)))
            return dataclasses.replace(found, capability=wider(served), on=on)

        patch.setattr(backends, "get", widened)
        flash_calls.varlen_function.cache_clear()
        flash_calls.dense_function.cache_clear()
        flash.calls.clear()
        flash.repeats.clear()
        if "xformers" in installed:
            from tests.fakes import xformers as fake

            for part in ("", "_forward_requires_grad", "_backward"):
                name = f"memory_efficient_attention{part}"
                patch.setattr(xformers.ops, name, getattr(fake, name))
            fake.calls.clear()
        if "fp8" in installed:
            patch.setattr(torchao, "STORAGE", torch.float32)  # unrounded: what is left is the adapter's own
            quantisers = types.ModuleType("torchao.prototype.attention.quantization")
            quantisers._fp8_sdpa_quantize = torchao.fp8_sdpa_quantize  # type: ignore[attr-defined]
            patch.setitem(sys.modules, quantisers.__name__, quantisers)
            patch.setitem(sys.modules, "axattn.kernels.fp8_quantiser", fp8_quantiser)
            patch.setattr(axattn.kernels, "fp8_quantiser", fp8_quantiser, raising=False)
        if "sage" in installed:
            from axattn.kernels import int8_attention
            from tests.fakes import int8

            for name in ("quantise", "forward"):
                patch.setattr(int8_attention, name, getattr(int8, name))
            int8.calls.clear()
        fp8.varlen_function.cache_clear()
        try:
            yield environment
        finally:
            flash_calls.varlen_function.cache_clear()
            flash_calls.dense_function.cache_clear()
            fp8.varlen_function.cache_clear()


def _in_float32(refused: Refused) -> Refused:
    """A combination refused in 16 bit, for which float32 stands here."""
    return dataclasses.replace(refused, dtypes=refused.dtypes | {"float32"}) if refused.dtypes else refused


def _modules(patch: pytest.MonkeyPatch, installed: tuple[str, ...]) -> None:
    def module(name: str, source: Any) -> None:
        made = types.ModuleType(name)
        for key in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "__version__"):
            if hasattr(source, key):
                setattr(made, key, getattr(source, key))
        patch.setitem(sys.modules, name, made)

    if "flash_attention_2" in installed or "flash_attention_4" in installed:
        module("flash_attn", flash.FlashAttention2 if "flash_attention_2" in installed else object)
        padding = getattr(flash.FlashAttention2, "bert_padding", None)  # where it is the library itself (`tests.real`)
        if padding is None:
            padding = types.ModuleType("flash_attn.bert_padding")
            padding.pad_input, padding.unpad_input = fa._pad_input, fa._unpad_input  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    if "flash_attention_3" in installed:
        module("flash_attn_interface", flash.FlashAttention3)
    if "flash_attention_4" in installed:
        module("flash_attn.cute", flash.FlashAttention4)
    if "fp8" in installed:
        module("fa3_fwd_interface", flash.FlashAttention3Forward)
