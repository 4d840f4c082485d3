"""`TensorLike`: an object that a model takes in place of a bool tensor, and that becomes one on access."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from axattn.errors import Reason, UnsupportedAttentionError


class TensorLike:
    """The interface of a 4-D bool tensor that models use. Arithmetic, ``.to``, torch functions and unknown attributes
    materialise it; adding it to floats raises.

    Attributes:
        shape: ``[B, 1, S, T]``.
        device: where the tensor would be.
    """

    __slots__ = ()

    shape: torch.Size
    device: torch.device
    dtype = torch.bool
    ndim = 4
    requires_grad = False
    is_cuda = property(lambda self: self.device.type == "cuda")

    def dense(self) -> torch.Tensor:
        """The tensor itself."""
        raise NotImplementedError

    def dim(self) -> int:
        """4."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """As ``torch.Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As ``torch.Tensor.numel``."""
        return self.shape.numel()

    def contiguous(self, *_: Any, **__: Any) -> Any:
        """Itself (``generate`` calls this on every mask)."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself on the requested device; another dtype makes it dense."""
        wanted = [a for a in (*args, kwargs.get("device"), kwargs.get("dtype")) if a is not None]
        for given in wanted:
            if isinstance(given, torch.Tensor) or (isinstance(given, torch.dtype) and given != torch.bool):
                return self.dense().to(*args, **kwargs)
        places = [
            torch.device(a) for a in wanted if isinstance(a, str | torch.device | int) and not isinstance(a, bool)
        ]
        return self if not places or _same(places[0], self.device) else self.on(places[0])

    def on(self, device: torch.device) -> Any:
        """The same on another device."""
        return self.dense().to(device)

    def __len__(self) -> int:
        return self.shape[0]

    def __eq__(self, other: object) -> Any:
        """Elementwise with a number or a tensor, as for tensors; else whether both are the same object."""
        return self.dense() == other if isinstance(other, torch.Tensor | int | float) else self is other

    def __ne__(self, other: object) -> Any:
        """The opposite of ``==``."""
        return self.dense() != other if isinstance(other, torch.Tensor | int | float) else self is not other

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch.utils._pytree import tree_map

        def densify(value: Any) -> Any:
            return value.dense() if isinstance(value, TensorLike) else value

        if func in _SUMS:
            _require_no_sum(*args)
        return func(*tree_map(densify, args), **tree_map(densify, kwargs or {}))


def _same(requested: torch.device, own: torch.device) -> bool:
    """Whether `requested` is the device `own`: ``cuda`` is the current CUDA device."""
    return requested == own or (
        requested.type == own.type and requested.index is None and torch.empty(0, device=requested).device == own
    )


_SUMS = frozenset({torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.add_})
_SUMS |= {torch.Tensor.__iadd__, torch.baddbmm}


def _require_no_sum(*operands: Any) -> None:
    """Raise if the mask would be added to logits: True and False would count as 1 and 0 and mask nothing.

    Raises:
        UnsupportedAttentionError: an operand is floating, as in attention modules with their own code (GIT).
    """
    if any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in operands):
        text = (
            "an attention layer of this model adds its mask to the logits itself, not through Transformers' interface"
        )
        raise UnsupportedAttentionError(
            "this model can't take another attention kernel",
            [Reason("model", text)],
            'Use attn_implementation="eager".',
        )


def _forwarded(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: TensorLike, *args: Any) -> Any:
        if name == "add":
            _require_no_sum(*args)
        return function(self.dense(), *args)

    return method


def _reflected(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: TensorLike, other: Any) -> Any:
        if name == "add":
            _require_no_sum(other)
        return function(other, self.dense())

    return method


for _name in ("and_", "or_", "xor", "add", "sub", "mul", "truediv", "invert", "lt", "le", "gt", "ge"):
    setattr(TensorLike, f"__{_name.strip('_')}__", _forwarded(_name))
for _name in ("and_", "or_", "xor", "add", "sub", "mul", "truediv"):
    setattr(TensorLike, f"__r{_name.strip('_')}__", _reflected(_name))
