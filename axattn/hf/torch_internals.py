"""What axattn takes from torch by private names: operators of attention, frames of module calls, dispatch keys.

One function for each use, so that a new torch is met in this file alone; the contracts that watch them are in
`axattn.hf.contracts`. No attention is put together here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
    """Flash attention on a CPU with its logsumexp.

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
    """Flash attention of packed sequences on a GPU, as torch ships it.

    Args:
        query: ``[tokens, H, D]``.
        key: ``[tokens, Hkv, D]``.
        value: ``[tokens, Hkv, D]``.
        cu_seqlens: int32 ``[N + 1]`` of queries and of keys.
        longest: the longest sequence of queries and of keys.
        scale: factor on the logits.
        window: keys seen to the left and to the right, bottom-right aligned, -1 for all.

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
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of the dropout there is not
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


def autograd_in_operator() -> Any:
    """A context manager: autograd inside a custom operator, where torch has switched its dispatch keys off."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutogradOther"):
        exclude = exclude.remove(torch._C._dispatch_key_parse(key))
    return torch._C._ForceDispatchKeyGuard(include, exclude)


# ---- tracers and transforms ------------------------------------------------------------------------------------------


def is_tracing() -> bool:
    """Whether values of tensors can't be read now: a graph is recorded (``torch.compile``, ``torch.export``,
    ``torch.jit.trace``), or ``torch.func.vmap`` runs many samples as one."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or _maps_samples()


def leaves_kernels() -> bool:
    """Whether attention has to run in torch's own operators: the graph is for other programs (``torch.export``,
    ``torch.onnx.export``, ``torch.jit.trace``), or a transform of ``torch.func`` differentiates or maps them."""
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag  # Dynamo before torch 2.13 says True for is_exporting()
    return torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Whether a graph for other programs is recorded."""
    # Dynamo knows `torch.jit.is_tracing` and not the private one
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch's has no types
    return torch.compiler._is_exporting_flag or traced


def require_when_run(condition: torch.Tensor, text: str) -> None:
    """Assert that a bool tensor ``[]`` is True when the graph that is being recorded runs; under ``torch.func.vmap``
    at once, for all samples.

    Raises:
        UnsupportedAttentionError: a sample under ``vmap`` for which it is False.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        torch._assert_async(condition, f"axattn: {text}")
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(condition):
        condition = torch._C._functorch.get_unwrapped(condition)
    if not bool(condition.all()):
        raise UnsupportedAttentionError("this batch can't run under torch.func.vmap", [Reason("values", text)])


def is_mapped(x: torch.Tensor) -> bool:
    """Whether a tensor holds another value for each sample of ``torch.func.vmap``."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def running_max(x: torch.Tensor) -> torch.Tensor:
    """int ``[B, S]``: the highest value of each row up to here, without ``cummax`` where ONNX, which lacks it, may be
    the target."""
    if not is_exporting():
        return x.cummax(-1).values
    size = x.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    return torch.where(earlier, x[:, None, :], x[:, None, :1]).amax(-1)


def _maps_samples() -> bool:
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.13
def in_traced_subgraph() -> bool:
    """Whether Dynamo is tracing the body of a higher-order operator such as a checkpoint's, which may change nothing
    that outlives it. To be asked while a graph is traced.

    Where a newer torch keeps that elsewhere the answer is yes: nothing is then changed where nothing may be.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tracer = InstructionTranslator.current_tx().output.current_tracer
    except AttributeError:  # not Dynamo: `torch.export` without it
        return True
    return getattr(tracer, "parent", tracer) is not None


# ---- calls of modules ------------------------------------------------------------------------------------------------

_CALL = torch.nn.Module._call_impl.__code__
"""The function in which torch calls a module: its locals are ``self``, ``args`` and ``kwargs``."""
_FRAMES = 40


def calls_around(module: torch.nn.Module) -> tuple[bool, list[tuple[torch.nn.Module, torch.Tensor | None, Any]]]:
    """The modules whose calls lead to that of `module`.

    Args:
        module: it is being called, and this is one of its forward pre-hooks.

    Returns:
        Whether the call of `module` itself was found (if not, nothing can be said of others); and of each module
        around it, innermost first, itself, its first tensor and its keywords.
    """
    own, found = False, []
    frame = inspect.currentframe()
    for _ in range(_FRAMES):
        if frame is None:
            break
        if frame.f_code is _CALL:
            here = frame.f_locals
            if here["self"] is module:
                own = True
            else:
                given: dict[str, Any] = here["kwargs"]
                first = given.get("input_ids", next(iter(here["args"]), None))
                found.append((here["self"], first if isinstance(first, torch.Tensor) else None, given))
        frame = frame.f_back
    return own, found


def keywords_of_call(frame: FrameType) -> dict[str, Any] | None:
    """What a module is called with by keyword, in the frame in which torch calls it; None in any other frame."""
    return frame.f_locals["kwargs"] if frame.f_code is _CALL else None


def is_executing(frame: FrameType) -> bool:
    """Whether a frame still runs: Python clears a frame that does not, and refuses to clear one that does.

    The frame is one of torch's own, whose locals nobody looks for; looking for it on the stack instead takes three
    times as long and grows with its depth (benchmarks/NOTES.md).
    """
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


def pre_hooks(module: torch.nn.Module) -> list[Any]:
    """The forward pre-hooks of a module."""
    return list(module._forward_pre_hooks.values())


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """Every hook of a module, before and after its forward and its backward."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for kind in kinds for hook in kind.values()]


def last_pre_hook(module: torch.nn.Module) -> int:
    """The key of the forward pre-hook of a module that runs last; it has one."""
    last: int = next(reversed(module._forward_pre_hooks))
    return last


def take_pre_hook(module: torch.nn.Module, hook: Any) -> tuple[int, bool]:
    """Take a forward pre-hook off a module; returns what `put_pre_hook` needs to put it back in its place."""
    key = next(key for key, one in module._forward_pre_hooks.items() if one is hook)
    del module._forward_pre_hooks[key]
    return key, module._forward_pre_hooks_with_kwargs.pop(key, False)


def put_pre_hook(module: torch.nn.Module, hook: Any, key: int, with_kwargs: bool) -> None:
    """Undo `take_pre_hook`."""
    module._forward_pre_hooks[key] = hook
    if with_kwargs:
        module._forward_pre_hooks_with_kwargs[key] = True


def remove_hooks(module: torch.nn.Module, whose: Callable[[Any], bool]) -> None:
    """Take forward pre-hooks and forward hooks off a module that `whose` says yes to."""
    before: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs]
    after: list[dict[int, Any]] = [module._forward_hooks, module._forward_hooks_with_kwargs]
    for tables in (before, [*after, module._forward_hooks_always_called]):
        for key in [key for key, hook in tables[0].items() if whose(hook)]:
            for table in tables:
                table.pop(key, None)


# ---- texts -----------------------------------------------------------------------------------------------------------


def in_context_parallel(function: Any) -> bool:
    """Whether a function that stands in the place of ``F.scaled_dot_product_attention`` is that of torch's
    ``context_parallel``: known by its name."""
    return "context_parallel" in f"{getattr(function, '__module__', '')} {getattr(function, '__qualname__', '')}"
