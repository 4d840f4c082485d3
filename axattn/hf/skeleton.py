"""`Skeleton`: a copy of a model without layers and weights. Running it on a CPU takes a millisecond and shows what the
code of the head, embeddings and pooler does with inputs. The questions are in `axattn.hf.probes`.

The model may be 70B, sharded, quantised or on ``meta``: only shapes of its weights are read, and it neither runs nor
changes. Lists of layers are empty in the copy, so no layer runs.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch

from axattn.hf.source_inspection import code_of
from axattn.hf.weak_cache import weak_cache

_LARGEST = 1 << 20
"""Largest parameter (in elements) that gets values; a larger one has only a shape."""
_FEW = 256
"""Size of the vocabulary for logits; embeddings keep the full size."""
_WRAPPERS = ("original_module", "_orig_mod", "_checkpoint_wrapped_module", "base_layer")
"""Attributes in which PEFT's and torch's wrappers store the wrapped module."""
_OWN = frozenset({*vars(torch.nn.Module()), "forward", "_replicate_for_data_parallel"})
"""Attributes that are not copied: parameters, children, hooks; and those that patches set on an instance."""
_COMPARED_BY_REPR = (bool, int, float, str, type(None), list, tuple, dict, set, torch.dtype)
"""Types whose ``repr`` identifies the value."""


class Table(torch.nn.Embedding):
    """An embedding without weights. It records the requested indices (`inputs`) and the returned vectors (`outputs`,
    leaves of an autograd graph)."""

    def __init__(self, rows: int, width: int, padding: int | None) -> None:
        torch.nn.Module.__init__(self)
        self.resize(rows, width, padding)

    def resize(self, rows: int, width: int, padding: int | None) -> None:
        """As ``nn.Embedding.__init__``."""
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, width, padding
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.__dict__["weight"] = Shape.of((rows, width), self)
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def rows_of(self, index: torch.Tensor) -> torch.Tensor:
        """int ``[...]`` → float32 ``[..., D]``, a different vector for each index.

        Raises:
            IndexError: an index outside of the table, as for ``nn.Embedding``.
        """
        if bool(((index < 0) | (index >= self.num_embeddings)).any()):
            raise IndexError("index out of range in self")
        self.inputs.append(index.detach().clone())
        vector = torch.cos((index[..., None] + 1).float() * torch.arange(1, self.embedding_dim + 1))
        self.outputs.append(vector.requires_grad_())
        return vector * 1.0  # models change it in place, which autograd forbids for a leaf

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `rows_of`."""
        return self.rows_of(input)


class Projection(torch.nn.Module):
    """A low-rank linear layer of any size in which each output depends on every input."""

    def __init__(self, inputs: int, outputs: int, biased: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.down, self.up = _values((4, inputs)), _values((4, outputs))  # a norm would make rank one constant
        self.__dict__["weight"] = Shape.of((outputs, inputs))
        self.__dict__["bias"] = torch.zeros(outputs, dtype=torch.float32) if biased else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """float ``[..., I]`` → float32 ``[..., O]``."""
        # no matmul: on a busy machine the BLAS threads wait for each other longer than the rest takes; a mean, so that
        # a tanh after it is not saturated
        inner = [(input.float() * row).mean(-1, keepdim=True) for row in self.down]
        return torch.stack([x * row for x, row in zip(inner, self.up, strict=True)]).sum(0)


class Watched:
    """Records the ``position_ids`` of a module (`inputs`); mixed into the copy of a rotary embedding."""

    inputs: list[torch.Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs and output as for the original."""
        forward: Any = super().forward  # type: ignore[misc]  # of the class that this is mixed into
        found = signature(forward.__func__).bind_partial(self, *args, **kwargs).arguments.get("position_ids")
        if isinstance(found, torch.Tensor):
            self.inputs.append(found.detach().clone())
        buffers = cast(torch.nn.Module, self).buffers()
        if any(buffer.is_meta for buffer in buffers):  # the values don't matter: there are no layers
            return torch.ones(1, 1, 1), torch.ones(1, 1, 1)
        return forward(*args, **kwargs)


class Layers(torch.nn.ModuleList):
    """An empty list of layers: loops end at once, and a layer taken by index returns its input."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else _Layer()


class _Layer(torch.nn.Module):
    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


class Shape(torch.Tensor):
    """A weight that has only a shape: computing with it raises, except reading rows of a `Table`."""

    table: Table | None

    @staticmethod
    def of(shape: tuple[int, ...], table: Table | None = None) -> torch.Tensor:
        """A float32 tensor of this shape that stores one number."""
        new = torch.zeros((), dtype=torch.float32, device="cpu").expand(shape).as_subclass(Shape)
        new.table = table
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs functions that read the shape, or rows of a table.

        Raises:
            TypeError: any other function.
        """
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "size", "dim", "numel", "is_floating_point"):
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name == "embedding" and isinstance(args[1], Shape) and args[1].table is not None:
            return args[1].table.rows_of(args[0])
        if name == "__getitem__" and isinstance(args[0], Shape) and args[0].table is not None:
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            found = args[0].table.rows_of(torch.arange(args[0].shape[0])[first])
            return found[(..., *rest)] if rest else found
        raise TypeError(f"{name} of a weight that has no values in a skeleton")


class _Omitted:
    """Replaces an attribute that refers to a real module, which a skeleton must not run.

    Raises:
        TypeError: it is called (it has no ``__call__``).
    """


class Skeleton:
    """The copy of one model.

    Attributes:
        root: the copy of the model, in evaluation mode, float32 on the CPU.
        config: a copy of its config; a large vocabulary is truncated.
        vocabulary: the model's vocabulary size.
        key: everything that determines the copy's behaviour: classes, simple attributes, config values.

    Raises:
        RuntimeError: a buffer that can't be read.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules: dict[int, torch.nn.Module] = {}
        self._configs: dict[int, Any] = {}
        self._fingerprints: list[Any] = []  # hashable
        self._vocabularies: set[int] = set()
        self.root = self._module(model)
        self.config: Any = self.root.config
        config: Any = model.config
        self.vocabulary = int(getattr(config.get_text_config(), "vocab_size", None) or _FEW)
        self.key = tuple(self._fingerprints)

    def tables(self) -> Iterator[Table]:
        """The unique embeddings of the copy."""
        yield from (module for module in self.root.modules() if isinstance(module, Table))

    def readers(self) -> list[list[torch.Tensor]]:
        """The recorded inputs of each embedding and rotary embedding: lists that fill during a run."""
        return [module.inputs for module in self.root.modules() if isinstance(module, Table | Watched)]

    def forget(self) -> None:
        """Clear all records."""
        for inputs in self.readers():
            inputs.clear()
        for table in self.tables():
            table.outputs.clear()

    def _config(self, config: Any) -> Any:
        """A copy of a config and its sub-configs, on eager attention."""
        if id(config) not in self._configs:
            new = self._configs[id(config)] = copy.copy(config)
            values = vars(new)
            values["_attn_implementation_internal"] = (
                "eager"  # an axattn backend would build masks for an open input hook
            )
            words = values.get("vocab_size")
            if isinstance(words, int) and words > _FEW:
                self._vocabularies.add(words)
                values["vocab_size"] = _FEW
                self._fingerprints.append(words)
            for name, value in list(values.items()):
                if hasattr(value, "sub_configs"):
                    values[name] = self._config(value)
                elif not name.startswith("_"):
                    self._fingerprints.append((name, _fingerprint(value)))
            self._fingerprints.append(type(config))
        return self._configs[id(config)]

    def _module(self, module: torch.nn.Module) -> torch.nn.Module:
        if id(module) not in self._modules:
            inner = next((found for name in _WRAPPERS if (found := module._modules.get(name)) is not None), None)
            self._modules[id(module)] = self._copied(module) if inner is None else self._module(inner)
        return self._modules[id(module)]

    def _copied(self, module: Any) -> torch.nn.Module:
        cls = code_of(module)
        cls = type(module) if cls is torch.nn.Module else cls  # containers have no forward
        self._fingerprints.append(cls)
        if isinstance(module, torch.nn.ModuleList) and any(next(one.children(), None) is not None for one in module):
            return Layers()
        embeds = isinstance(module, torch.nn.Embedding)
        sizes = [(one, other) for one, other in _SIZES if hasattr(module, one) and hasattr(module, other)]
        if sizes and not embeds:
            inputs, outputs = (getattr(module, name) for name in sizes[0])
            self._fingerprints.append((inputs, outputs))
            return Projection(inputs, self._cut(outputs), getattr(module, "bias", None) is not None)
        if embeds:
            cls = type(cls.__name__, (cls, Table), {}) if cls is not torch.nn.Embedding else Table
        elif "position_ids" in signature(cls.forward).parameters and next(module.parameters(), None) is None:
            cls = type(cls.__name__, (Watched, cls), {"inputs": []})
        new: torch.nn.Module = object.__new__(cls)
        torch.nn.Module.__init__(new)
        self._modules[id(module)] = new
        for name, value in vars(module).items():
            if name not in _OWN:
                new.__dict__[name] = self._attribute(name, value)
        if isinstance(new, Table):
            new.resize(module.num_embeddings, module.embedding_dim, module.padding_idx)
        # models read dtype and device from their first parameter
        new._parameters["_"] = torch.nn.Parameter(torch.zeros((), dtype=torch.float32), requires_grad=False)
        for name, value in module._parameters.items():
            if name not in vars(new):
                new.__dict__[name] = None if value is None else _parameter(tuple(map(self._cut, value.shape)))
                self._fingerprints.append((name, None if value is None else tuple(value.shape)))
        for name, value in module._buffers.items():
            new._buffers[name] = None if value is None else self._buffer(value)
            self._fingerprints.append((name, None if value is None else (tuple(value.shape), value.is_meta)))
        for name, child in module._modules.items():
            self._fingerprints.append(name)
            new._modules[name] = None if child is None else self._module(child)
        new.training = False
        return new

    def _attribute(self, name: str, value: Any) -> Any:
        if hasattr(value, "sub_configs"):
            return self._config(value)
        if _holds_modules(value):
            return _Omitted()
        # a user's loss function is part of the key, by weak reference
        self._fingerprints.append((name, weakref.ref(value) if name == "_loss_function" else _fingerprint(value)))
        return self._cut(value) if name == "vocab_size" else value

    def _buffer(self, value: torch.Tensor) -> torch.Tensor:
        new = torch.empty_like(value) if value.is_meta else value.detach().to("cpu", copy=True)
        return new[..., : self._cut(new.shape[-1])] if new.ndim else new

    def _cut(self, size: int) -> int:
        """The size, truncated if it is a vocabulary's."""
        return _FEW if size in self._vocabularies else size


_SIZES = (("in_features", "out_features"), ("nx", "nf"))
"""Attribute names of the sizes of linear layers; the second are GPT-2's."""


@weak_cache
def signature(forward: Any) -> inspect.Signature:
    """The signature of the undecorated ``forward``, with ``self``."""
    return inspect.signature(inspect.unwrap(forward))


def _values(shape: tuple[int, ...]) -> torch.Tensor:
    """Fixed values, different in each row: a strided view of as few numbers as the sum of the sizes."""
    line = torch.sin(torch.arange(1, sum(shape) + 2, dtype=torch.float32, device="cpu") ** 2)
    return line.as_strided(shape, [1] * len(shape))


def _parameter(shape: tuple[int, ...]) -> torch.Tensor:
    return _values(shape) if torch.Size(shape).numel() <= _LARGEST else Shape.of(shape)


def _fingerprint(value: Any) -> Any:
    """A hashable value that distinguishes `value` from others."""
    if isinstance(value, _COMPARED_BY_REPR):
        return repr(value)
    return weakref.ref(value) if isinstance(value, types.FunctionType) else type(value)


def _holds_modules(value: Any) -> bool:
    """Whether an attribute refers to a real module: directly, in a container, or by a bound method."""
    if isinstance(value, torch.nn.Module | types.MethodType):
        return True
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return any(map(_holds_modules, several))
