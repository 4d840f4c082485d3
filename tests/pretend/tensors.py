"""`PretendTensor`: says that it lies on a GPU, holds its values on the CPU, and refuses what a GPU refuses."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default, aten._copy_from_and_resize.default}
"""Operators that take tensors of two devices."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
"""Operators whose indices may lie on the CPU."""
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
"""Operators that wait for the GPU: their result, or its size, is needed on the host."""

STAND_INS = {
    aten.histc.default: lambda x, *given, **options: aten.histc.default(x.float(), *given, **options).to(x.dtype),
}
"""Operators that a GPU has for types that the CPU lacks."""


class PretendTensor(torch.Tensor):
    """A tensor on a pretended GPU.

    Attributes:
        inner: its values, on the CPU.
    """

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results stay as they are

    @staticmethod
    def __new__(
        cls, inner: torch.Tensor, device: torch.device | None = None, requires_grad: bool | None = None
    ) -> PretendTensor:
        """Wrap a tensor of the CPU. Accelerate gives one of these, to make a parameter of its class."""
        if isinstance(inner, PretendTensor):
            return inner.detach().requires_grad_(bool(requires_grad))
        assert device is not None
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", device.index or 0),
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Its values and its device."""
        return f"PretendTensor({self.inner.detach()}, {self.device})"

    def tolist(self) -> Any:
        """torch itself has none for tensors like this one."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """A GPU's tensors have none."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return compute(func, args, kwargs or {})


class State:
    """What all threads share.

    Attributes:
        mixing: inside of how many fake kernels, which stand for code on the GPU: there devices may mix.
        waits: operators that waited for a GPU, by name: reads, and copies to it from memory that is not pinned.
        copies: copies to a GPU from the host, by name.
        launches: fake kernels that ran, by name and number of the GPU.
    """

    mixing = 0
    waits: ClassVar[Counter[str]] = Counter()
    copies: ClassVar[Counter[str]] = Counter()
    launches: ClassVar[Counter[tuple[str, int]]] = Counter()


class _Operator(threading.local):
    """The GPU of axattn's operator that this thread is in: its body is given the values alone."""

    device: torch.device | None = None


_operator = _Operator()


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the values, after the checks that a GPU would make.

    Raises:
        RuntimeError: tensors on two devices.
    """
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    target = kwargs.get("device")
    pretended = {x.device for x in tensors if isinstance(x, PretendTensor)}
    if target is None and not pretended:
        return func(*args, **kwargs)
    if not State.mixing:
        _require_one_device(func, args, tensors, pretended)
    device = torch.device(target) if target is not None else _device_of(func, args, pretended)
    if not State.mixing and (
        (func in READS and kwargs.get("output_size") is None)
        or (func in MOVES and device.type == "cpu" and pretended)
        or _reads_bools(func, args)
    ):
        State.waits[str(func)] += 1
    if not State.mixing and func in MOVES and device.type != "cpu" and _from_host(func, args):
        State.copies[str(func)] += 1
        if not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))):
            State.waits[f"{func} to the GPU"] += 1
    plain = tree_map(lambda x: x.inner if isinstance(x, PretendTensor) else x, (args, kwargs))
    if target is not None:
        plain[1]["device"] = torch.device("cpu")
    if getattr(func, "namespace", "") == "axattn":
        outside, _operator.device = _operator.device, device
        try:
            out = func(*plain[0], **plain[1])
        finally:
            _operator.device = outside
    else:
        out = STAND_INS.get(func, func)(*plain[0], **plain[1])
    if any(isinstance(x, torch.Tensor) and (x.is_conj() or x.is_neg()) for x in tree_flatten(out)[0]):
        out = tree_map(lambda x: x.resolve_conj().resolve_neg(), out)  # bits that a wrapper would not show
    if device.type == "cpu":
        return out.clone() if pretended and func in MOVES and isinstance(out, torch.Tensor) else out
    wrapped = tree_map(lambda x: PretendTensor(x, device) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if pretended else wrapped


def _from_host(func: Any, args: Any) -> bool:
    source = args[1] if func is aten.copy_.default else args[0]
    return not isinstance(source, PretendTensor)


def _device_of(func: Any, args: Any, pretended: set[torch.device]) -> torch.device:
    if func is aten.copy_.default:
        device: torch.device = args[0].device
        return device
    return next(iter(pretended))


def _reads_bools(func: Any, args: Any) -> bool:
    return func in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])


def _require_one_device(func: Any, args: Any, tensors: list[torch.Tensor], pretended: set[torch.device]) -> None:
    if func in MOVES:
        return
    if func in INDEXING:
        tensors = [*(x for x in tree_flatten(args)[0] if isinstance(x, PretendTensor)), *args[2:3]]
    devices = pretended | {x.device for x in tensors if isinstance(x, torch.Tensor) and x.ndim > 0}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {sorted(map(str, devices))}")


@contextlib.contextmanager
def on_the_gpu() -> Iterator[None]:
    """A fake kernel runs: what it makes on the CPU stands for memory of the GPU."""
    State.mixing += 1
    try:
        yield
    finally:
        State.mixing -= 1


class PretendMode(TorchDispatchMode):
    """Makes and moves tensors to pretended GPUs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `compute`."""
        return compute(func, args, kwargs or {})


class TensorFunction(TorchFunctionMode):
    """``torch.tensor``, which torch runs below every dispatch mode: made on the CPU, then moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Values of tensors in a list are read first."""
        kwargs = kwargs or {}
        if func is not torch.tensor or isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cuda":
            return func(tree_map(_read, args[0]), *args[1:], **kwargs)
        return func(tree_map(_read, args[0]), *args[1:], **{**kwargs, "device": "cpu"}).to(device)


@contextlib.contextmanager
def modes() -> Iterator[None]:
    """What a thread needs to use pretended GPUs."""
    with PretendMode(), TensorFunction():
        yield


def _read(x: Any) -> Any:
    return x.tolist() if isinstance(x, PretendTensor) else x


def kernel(function: Callable[..., Any], sets_device: bool = False) -> Callable[..., Any]:
    """A fake kernel as it would be called: tensors of one GPU, which is the current one in the calling thread.

    Args:
        function: the fake.
        sets_device: the library makes the GPU of its tensors the current one before it launches.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = _operator.device or _one_gpu(function.__name__, args, kwargs)
        if not sets_device and device.index != torch.cuda.current_device():
            current = torch.cuda.current_device()
            raise RuntimeError(f"{function.__name__} launches on cuda:{current}, and its tensors are on {device}")
        State.launches[function.__name__, device.index] += 1
        with on_the_gpu():
            return function(*args, **kwargs)

    return run


def _one_gpu(name: str, args: Any, kwargs: Any) -> torch.device:
    devices = {x.device for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
    if len(devices) > 1 or torch.device("cpu") in devices:
        raise RuntimeError(f"{name} got tensors on {sorted(map(str, devices))}")
    return devices.pop()
