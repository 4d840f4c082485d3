"""Cells of the conformance matrix with the model under test on pretended GPUs; the reference stays on the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from axattn.backends.varlen_engine import forward_backward, packed
from axattn.machine.environment import Environment
from tests.conformance import cells
from tests.conformance.cases import Case
from tests.conformance.cells import Cell
from tests.environments import machine as environment
from tests.fakes import flash, fp8_quantiser, int8, sageattention, torchao, xformers
from tests.pretend.machine import two_gpus
from tests.pretend.tensors import kernel

PLACES = ("one", "two")
_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
# those of FlashAttention set the device themselves: 2 and 3 in C++ (a guard in each `mha_*`), 4 in the caller that
# CuTe makes for TVM-FFI; in no other library does anything set it
_FAKES: dict[Any, tuple[tuple[str, ...], bool]] = {
    flash.FlashAttention2: (_FUNCTIONS, True),
    flash.FlashAttention3: (_FUNCTIONS, True),
    flash.FlashAttention4: (_FUNCTIONS, True),
    flash: (("_flash_attn_forward", "_flash_attn_backward", "_flash_attn_varlen_backward"), True),
    flash.FlashAttention3Forward: (_FUNCTIONS[1:], True),
    fp8_quantiser: (("quantise", "quantise_smoothed", "smoothed"), False),
    int8: (("quantise", "forward"), False),
    sageattention: (("sageattn", "sageattn_varlen"), False),
    torchao: (("fp8_sdpa_quantize",), False),
    xformers: (
        tuple(f"memory_efficient_attention{part}" for part in ("", "_forward_requires_grad", "_backward")),
        False,
    ),
}
_NONE = dict.fromkeys(("flash_attn", "flash_attn_3", "flash_attn_4", "xformers", "sageattention", "torchao"))
HOPPER_ALONE = environment("cuda", 90, **_NONE)
"""A Hopper GPU with torch and nothing else."""


def run(backend: str, family: str, scenario: str, place: str) -> Cell:
    """The cell with the model under test on one GPU, or its layers on two in turn."""
    with two_gpus(), _placed(place), kernels():
        return cells.run(backend, family, scenario)


@contextlib.contextmanager
def _placed(place: str) -> Iterator[None]:
    real = Case.candidate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "candidate", lambda self, **options: on_gpus(real(self, **options), place))
        yield


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """The machine is a Hopper GPU with torch alone, and torch's flash kernels take float32 there: in 16 bit a dropped
    feature could hide in the rounding. Fake kernels refuse tensors that are not on one GPU,
    or on another than the current one."""

    def serves(query: torch.Tensor) -> bool:
        return query.shape[-1] <= 256 and query.shape[-1] % 8 == 0

    with pytest.MonkeyPatch.context() as patch, flash.sharp():
        for room in (packed, forward_backward):
            patch.setattr(room, "runs_flash", serves)
        for holder, (names, sets_device) in _FAKES.items():
            for name in names:
                made = kernel(getattr(holder, name), sets_device)
                patch.setattr(holder, name, staticmethod(made) if isinstance(holder, type) else made)
        gpu = HOPPER_ALONE
        patch.setattr(Environment, "current", classmethod(lambda cls: gpu))
        real = cells.error
        patch.setattr(cells, "error", lambda found, expected: real({k: x.cpu() for k, x in found.items()}, expected))
        yield


def on_gpus(model: Any, place: str) -> Any:
    """A model on GPUs, called with tensors of the CPU; what it returns is there again."""
    if place == "one":
        model.to("cuda:0")
    else:
        _over_two(model)
    model.register_forward_pre_hook(_to_gpu, with_kwargs=True, prepend=True)
    model.register_forward_hook(_to_cpu)
    model.get_input_embeddings().register_forward_pre_hook(_to_gpu, with_kwargs=True, prepend=True)
    generate = getattr(model, "generate", None)
    if generate is not None:

        @functools.wraps(generate)
        def moved(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _to_gpu(model, args, kwargs)
            return generate(*args, **kwargs).cpu()

        model.generate = moved
    return model


def _over_two(model: Any) -> None:
    import accelerate

    names = [name for name, module in model.named_modules() if type(module).__name__.endswith(("Layer", "Block"))]
    whole: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name == n or name.startswith(n + ".") for n in names)
        own = next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)]), None)
        if not inside and (own is not None or not list(module.children())):
            whole[name] = 0
    for number, name in enumerate(names):
        if not any(name.startswith(other + ".") for other in names):
            whole[name] = (number + 1) % 2
    accelerate.dispatch_model(model, whole, force_hooks=True)


def _to_gpu(model: Any, args: Any, kwargs: Any) -> Any:
    return tree_map(lambda x: x.to("cuda:0") if isinstance(x, torch.Tensor) else x, (args, kwargs))


def _to_cpu(model: Any, args: Any, out: Any) -> Any:
    for name, given in list(out.items()) if hasattr(out, "items") else ():
        if isinstance(given, torch.Tensor | tuple) and name not in ("past_key_values",):
            out[name] = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, given)
    return out
