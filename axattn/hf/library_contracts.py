"""Contracts on torch, PEFT, accelerate and torchao, checked against the installed versions."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from axattn.hf import integrations, torch_internals
from axattn.hf.contracts import Contract


def _cpu_flash() -> str:
    """Compare the operators of packed rows on a CPU with attention from its definition, on a small call."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, 4, 8, generator=generator) for _ in range(4))
    out, logsumexp = torch_internals.cpu_flash_forward(q, k, v, True, None, 0.5)
    dq, _, dv = torch_internals.cpu_flash_backward(grad, q, k, v, out, logsumexp, True, None, 0.5)
    scores = (q @ k.transpose(-1, -2) * 0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    weights = scores.softmax(-1)
    d_scores = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
    pairs = (
        (out, weights @ v),
        (logsumexp, scores.logsumexp(-1)),
        (dv, weights.transpose(-1, -2) @ grad),
        (dq, d_scores @ k * 0.5),
    )
    return "" if all(torch.allclose(x, y, atol=1e-5) for x, y in pairs) else "it returns other values"


_FLASH_ARGUMENTS = {
    "_flash_attention_forward": [
        "query",
        "key",
        "value",
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
        "return_debug_mask",
        "scale",
        "window_size_left",
        "window_size_right",
    ],
    "_flash_attention_backward": [
        "grad_out",
        "query",
        "key",
        "value",
        "out",
        "logsumexp",
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
        "rng_state",
        "unused",
        "scale",
        "window_size_left",
        "window_size_right",
    ],
}


def _gpu_flash() -> str:
    for name, wanted in _FLASH_ARGUMENTS.items():
        operator: Any = getattr(torch.ops.aten, name).default
        found = [argument.name for argument in operator._schema.arguments][: len(wanted)]
        if found != wanted:
            return f"aten::{name} takes {', '.join(found)}"
    return ""


def _dispatch_keys() -> str:
    with torch_internals.autograd_in_operator():
        return "" if torch.ones(1, requires_grad=True).mul(2).requires_grad else "autograd stays off"


def _module_calls() -> str:
    found: list[Any] = []

    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor, keyword: int | None = None) -> torch.Tensor:
            return x

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor, keyword: int | None = None) -> torch.Tensor:
            return self.inner(x)  # type: ignore[no-any-return]  # a module's call has no type

    outer = Outer()
    outer.inner.register_forward_pre_hook(lambda module, args: found.extend(torch_internals.calls_around(module)))
    outer(torch.zeros(1), keyword=3)
    own, around = found
    return "" if own and around and around[0][0] is outer and around[0][2] == {"keyword": 3} else "they are not found"


def _hooks() -> str:
    module, ran = torch.nn.Identity(), []

    def before(*_: Any) -> None:
        ran.append("before")

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(lambda *_: ran.append("after"), always_call=True)
    key, with_kwargs = torch_internals.take_pre_hook(module, before)
    module(1)
    torch_internals.put_pre_hook(module, before, key, with_kwargs)
    module(1)
    return "" if ran == ["after", "before", "after"] and with_kwargs else "they are stored elsewhere"


def _replicas() -> str:
    exists = callable(getattr(torch.nn.Module, "_replicate_for_data_parallel", None))
    return "" if exists else "nn.DataParallel copies modules by another method"


def _frames() -> str:
    def finished() -> Any:
        return sys._getframe()

    running = torch_internals.is_executing(sys._getframe()) and not torch_internals.is_executing(finished())
    return "" if running else "frame.clear() does not show whether a frame runs"


def _tracers() -> str:
    """Whether transforms of ``torch.func`` are detected (`is_tracing`, `needs_torch_operators`, `is_mapped`)."""
    found: list[bool] = [
        torch_internals.is_tracing(),
        torch_internals.needs_torch_operators(),
        torch_internals.is_exporting(),
    ]

    def look(x: torch.Tensor) -> torch.Tensor:
        found.extend(
            (torch_internals.is_tracing(), torch_internals.needs_torch_operators(), torch_internals.is_mapped(x))
        )
        return x.sum()

    torch.func.vmap(look)(torch.zeros(1, 1))
    torch.func.grad(look)(torch.zeros(1))
    wanted = [False] * 3 + [True] * 3 + [False, True, False]
    return "" if found == wanted else "transforms of torch.func are not detected"


def _adapter_hooks() -> str:
    """Whether PEFT's hooks show the adapter of each row, in one forward of a layer under LoRA."""
    import peft

    found: list[dict[str, Any]] = []
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model: Any = peft.get_peft_model(layer, peft.LoraConfig(target_modules="0"))
    model.eval()
    watched = model.base_model.model[0].base_layer
    watched.register_forward_pre_hook(lambda *_: found.append(integrations.adapter_keywords(model)))
    with torch.no_grad():
        model(torch.zeros(1, 2), adapter_names=["__base__"])
    named = bool(found) and found[0].get("adapter_names") is not None
    return "" if named else "they do not show which adapter a row has"


def _accelerate_hooks() -> str:
    from accelerate import big_modeling

    known = integrations.CONTEXT_PARALLEL_HOOK
    return "" if callable(getattr(big_modeling, known, None)) else f"it has no {known}"


def _quantiser() -> str:
    first = list(inspect.signature(integrations.fp8_quantiser()).parameters)[:3]
    return "" if len(first) == 3 else f"it takes {', '.join(first)}"


CONTRACTS = (
    Contract("flash attention on a CPU", "torch", ("backends.varlen_engine.cpu_tiles",), _cpu_flash, "packed rows"),
    Contract(
        "flash attention on a GPU", "torch", ("backends.varlen_engine.flash_backward",), _gpu_flash, "packed rows"
    ),
    Contract(
        "autograd inside operators", "torch", ("backends.compiled_ops.body",), _dispatch_keys, "compiled packed rows"
    ),
    Contract("calls of modules", "torch", ("documents.wrapper_positions", "hf.callers"), _module_calls, ""),
    Contract("hooks of modules", "torch", ("patches.input_hooks", "parallel.accelerate"), _hooks, "models"),
    Contract("replicas of modules", "torch", ("patches.forward_wrapper",), _replicas, "unpadded rows"),
    Contract("frames", "torch", ("documents.forward_context",), _frames, "models"),
    Contract("tracers and transforms", "torch", ("backends.compiled_ops.portable",), _tracers, "models"),
    Contract("hooks of adapters", "peft", ("documents.peft_row_effects",), _adapter_hooks, "adapters by row"),
    Contract("hooks of context parallelism", "accelerate", ("parallel.accelerate",), _accelerate_hooks, ""),
    Contract("the fp8 quantiser", "torchao", ("backends.fp8",), _quantiser, "fp8"),
)
"""If calls of modules can't be found, a model under PEFT without position ids is refused when it runs
(`axattn.documents.wrapper_positions`); if accelerate's hooks can't, a call without its mask is refused
(`axattn.attention.interface`)."""
