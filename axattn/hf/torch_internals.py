"""Everything that axattn uses of torch by private names: attention operators, frames of module calls, dispatch keys.

One function per use, so that a new torch needs changes in this file only. The contracts that check them are in
`axattn.hf.library_contracts`. No attention logic here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch

from axattn.errors import Reason, UnsupportedAttentionError

# ---- operators -------------------------------------------------------------------------------------------------------


def cpu_flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention on a CPU, with the logsumexp.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, D]``.
        causal: top-left aligned.
        mask: additive ``[S, T]``, or None.
        scale: factor on the logits.

    Returns:
        Output ``[B, H, S, D]`` and logsumexp, float32 ``[B, H, S]``.
    """
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return found


def cpu_flash_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `cpu_flash_forward` to query, key and value; `grad` and `out` are ``[B, H, S, D]``."""
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, logsumexp, 0.0, causal, attn_mask=mask, scale=scale
        )
    )
    return found


def flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention of packed sequences on a GPU.

    Args:
        query: ``[tokens, H, D]``.
        key: ``[tokens, Hkv, D]``.
        value: ``[tokens, Hkv, D]``.
        cu_seqlens: int32 ``[N + 1]`` of queries and of keys.
        longest: the longest sequence of queries and of keys.
        scale: factor on the logits.
        window: visible keys to the left and to the right, bottom-right aligned, -1 for all.

    Returns:
        Output ``[tokens, H, D]`` and logsumexp, float32 ``[H, tokens]``.
    """
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *cu_seqlens,
        *longest,
        0.0,
        False,
        False,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )
    return out, logsumexp


def flash_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `flash_forward`, arguments as there. `logsumexp` may be that of a quantised forward."""
    none = torch.empty(0, device=query.device)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # unused: no dropout
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        logsumexp,
        *cu_seqlens,
        *longest,
        0.0,
        False,
        state,
        none,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )
    return found


def parameters_of(function: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, also if ``torch.library.custom_op`` has wrapped it."""
    return inspect.signature(getattr(function, "_init_fn", function)).parameters


def autograd_in_operator() -> Any:
    """A context manager that enables autograd inside a custom operator, where torch excludes its dispatch keys."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutogradOther"):
        exclude = exclude.remove(torch._C._dispatch_key_parse(key))
    return torch._C._ForceDispatchKeyGuard(include, exclude)


# ---- tracers and transforms ------------------------------------------------------------------------------------------


def is_tracing() -> bool:
    """Whether tensor values can't be read now: a graph is being traced (``torch.compile``, ``torch.export``,
    ``torch.jit.trace``), or ``torch.func.vmap`` runs many samples as one."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return torch._C._are_functorch_transforms_active() and _maps_samples()


def needs_torch_operators() -> bool:
    """Whether attention must use torch's operators: the graph is exported (``torch.export``, ``torch.onnx.export``,
    ``torch.jit.trace``), or a transform of ``torch.func`` differentiates or maps it."""
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag  # Dynamo before torch 2.13 returns True for is_exporting()
    return torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Whether a graph is being exported."""
    # Dynamo supports `torch.jit.is_tracing` but not the private function
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # untyped in torch
    return torch.compiler._is_exporting_flag or traced


def require_when_run(condition: torch.Tensor, text: str) -> None:
    """Assert that a bool tensor ``[]`` is True: when the traced graph runs, or under ``torch.func.vmap`` at once, for
    all samples.

    Raises:
        UnsupportedAttentionError: it is False for a sample under ``vmap``.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        torch._assert_async(condition, f"axattn: {text}")
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(condition):
        condition = torch._C._functorch.get_unwrapped(condition)
    if not bool(condition.all()):
        raise UnsupportedAttentionError("this batch can't run under torch.func.vmap", [Reason("values", text)])


def is_mapped(x: torch.Tensor) -> bool:
    """Whether a tensor has a value per sample of ``torch.func.vmap``."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def running_max(x: torch.Tensor) -> torch.Tensor:
    """int ``[B, S]``: cumulative maximum of each row; in exports without ``cummax``, which ONNX lacks."""
    if not is_exporting():
        return x.cummax(-1).values
    size = x.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    return torch.where(earlier, x[:, None, :], x[:, None, :1]).amax(-1)


def _maps_samples() -> bool:
    """Whether the active transforms of ``torch.func`` include ``vmap``."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.13
def in_traced_subgraph() -> bool:
    """Whether Dynamo is tracing the body of a higher-order operator (such as a checkpoint), which must not change state
    that outlives it. Call it only while a graph is traced.

    True if a newer torch has moved this information: no state is changed then.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tracer = InstructionTranslator.current_tx().output.current_tracer
    except AttributeError:  # `torch.export` without Dynamo
        return True
    return getattr(tracer, "parent", tracer) is not None


# ---- calls of modules ------------------------------------------------------------------------------------------------

_CALL = torch.nn.Module._call_impl.__code__
"""The function in which torch calls a module: its locals are ``self``, ``args`` and ``kwargs``."""
_FRAMES = 40


def calls_around(
    module: torch.nn.Module, keywords: frozenset[str] = frozenset()
) -> tuple[bool, list[tuple[torch.nn.Module, torch.Tensor | None, Any]]]:
    """The modules whose calls enclose that of `module`.

    Args:
        module: the module whose forward pre-hook is running.
        keywords: leave out the calls without any of these keywords; () for all calls.

    Returns:
        Whether the call of `module` itself was found (if not, the rest is unreliable); and for each enclosing call,
        innermost first, the module, its first tensor and its keywords.
    """
    own, found, code = False, [], _CALL
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        if frame.f_code is code:
            call = frame.f_locals
            given: dict[str, Any] = call["kwargs"]
            if call["self"] is module:
                own = True
            elif not (keywords and keywords.isdisjoint(given)):
                first = given["input_ids"] if "input_ids" in given else next(iter(call["args"]), None)
                found.append((call["self"], first if isinstance(first, torch.Tensor) else None, given))
        frame = frame.f_back
    return own, found


def keywords_of_call(frame: FrameType) -> dict[str, Any] | None:
    """The keywords of a module's call, from the frame in which torch calls it; None for other frames."""
    return frame.f_locals["kwargs"] if frame.f_code is _CALL else None


def is_executing(frame: FrameType) -> bool:
    """Whether a frame still runs: ``frame.clear()`` raises for a running frame and clears a finished one.

    Only for frames of torch's module calls, whose locals are not needed later. Searching the stack instead takes three
    times as long and grows with its depth (benchmarks/NOTES.md).
    """
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def pre_hooks(module: torch.nn.Module) -> list[Any]:
    """The forward pre-hooks of a module."""
    return list(module._forward_pre_hooks.values())


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """All forward and backward hooks of a module."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for kind in kinds for hook in kind.values()]


def take_pre_hook(module: torch.nn.Module, hook: Any) -> tuple[int, bool]:
    """Remove a forward pre-hook from a module; returns the arguments for `put_pre_hook`."""
    key = next(key for key, one in module._forward_pre_hooks.items() if one is hook)
    del module._forward_pre_hooks[key]
    return key, module._forward_pre_hooks_with_kwargs.pop(key, False)


def put_pre_hook(module: torch.nn.Module, hook: Any, key: int, with_kwargs: bool) -> None:
    """Undo `take_pre_hook`."""
    module._forward_pre_hooks[key] = hook
    if with_kwargs:
        module._forward_pre_hooks_with_kwargs[key] = True


def remove_hooks(module: torch.nn.Module, whose: Callable[[Any], bool]) -> None:
    """Remove the forward pre-hooks and forward hooks of a module for which `whose` is true."""
    before: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs]
    after: list[dict[int, Any]] = [module._forward_hooks, module._forward_hooks_with_kwargs]
    for tables in (before, [*after, module._forward_hooks_always_called]):
        for key in [key for key, hook in tables[0].items() if whose(hook)]:
            for table in tables:
                table.pop(key, None)


# ---- texts -----------------------------------------------------------------------------------------------------------


def in_context_parallel(function: Any) -> bool:
    """Whether a replacement of ``F.scaled_dot_product_attention`` comes from torch's ``context_parallel``, by its
    name."""
    return "context_parallel" in f"{getattr(function, '__module__', '')} {getattr(function, '__qualname__', '')}"
